"""From logits to a token: penalties, thresholds, and a draw that a seed fixes.

`gpukernels.sample` says what is chosen, and does it; here are the settings as a user writes them, and
one row on the host.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

import gpukernels
from model.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: what the logits are divided by; 0 takes the largest one (the lowest id of several)
            and draws nothing.
        top_k: keep the k largest logits; None or 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach this sum, one at
            least; None or 1 keeps all. Holtzman et al., arXiv 1904.09751.
        min_p: keep what is at least this fraction of the likeliest token's probability.
        repetition_penalty: logits of tokens already in the prompt or text are divided by it where
            positive, multiplied where negative. Keskar et al., arXiv 1909.05858.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        def require(name: str, fits: bool, want: str) -> None:
            if not fits:
                raise ModelError(f"{name} must be {want}, got {getattr(self, name)!r}")

        require("temperature", _number(self.temperature) and self.temperature >= 0, "a number, 0 or more")
        require("top_k", self.top_k is None or (whole(self.top_k) and self.top_k >= 0), "a whole number, or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(name, value is None or (_number(value) and 0 <= value <= 1), "a number from 0 to 1, or None")
        penalty = self.repetition_penalty
        require("repetition_penalty", _number(penalty) and penalty > 0, "a number above 0")


def choose(logits: np.ndarray, sampling: Sampling, uniform: float, seen: Collection[int] = ()) -> int:
    """The next token of one row.

    Args:
        logits: (V,) float32.
        uniform: in [0, 1); unused at temperature 0.
        seen: the ids that the repetition penalty falls on.

    Raises ModelError where the logits are not finite.
    """
    options = {}
    if sampling.repetition_penalty != 1.0 and len(seen):
        is_seen = np.zeros((1, logits.size), bool)
        is_seen[0, [token for token in seen if token < logits.size]] = True
        options = {"seen": is_seen, "repetition_penalty": _one(sampling.repetition_penalty)}
    if sampling.temperature:
        options["temperature"] = _one(sampling.temperature)
        options["uniforms"] = _one(uniform)
        for name in ("top_p", "min_p"):
            if getattr(sampling, name) is not None:
                options[name] = _one(getattr(sampling, name))
        if sampling.top_k:
            options["top_k"] = np.array([min(sampling.top_k, logits.size)])
    token = int(gpukernels.sample(logits[None], **options)[0])
    if token < 0:
        raise ModelError(f"the model's logits are not finite ({logits.max()}): its weights or activations overflowed")
    return token


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-24, from (seed, stream, step) and nothing else: `gpukernels.uniform`."""
    numbers = (np.array([number & 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.int64) for number in (seed, stream, step))
    return float(gpukernels.uniform(*numbers)[0])


def _one(value: float) -> np.ndarray:
    return np.array([value], np.float64)


def _number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def whole(value) -> bool:
    """Whether `value` is an integer, of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
