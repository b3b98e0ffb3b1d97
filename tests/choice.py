"""One row on the host: the token that `generate` must choose, from its logits and its random number."""

from collections.abc import Collection

import numpy as np

import gpukernels
from model.sampling import Sampling


def choose(logits: np.ndarray, sampling: Sampling, uniform: float, seen: Collection[int] = ()) -> int:
    """The next token of one row; -1 where the logits are not finite.

    Args:
        logits: (V,) float32.
        uniform: in [0, 1); unused at temperature 0.
        seen: the ids that the repetition penalty falls on.
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
    return int(gpukernels.sample(logits[None], **options)[0])


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-24, from (seed, stream, step) and nothing else: `gpukernels.uniform`."""
    numbers = (np.array([number & 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.int64) for number in (seed, stream, step))
    return float(gpukernels.uniform(*numbers)[0])


def _one(value: float) -> np.ndarray:
    return np.array([value], np.float64)
