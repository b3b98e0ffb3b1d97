"""From logits to a token: penalties, thresholds, and a draw that a seed fixes.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p, each on what the one
before it left. Each of the last three is a threshold, so tokens that tie there are all kept. The draw
inverts the cumulative distribution in the order of the vocabulary at a given uniform number, so that
any implementation with the same numbers makes the same choice.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from model.errors import ModelError

_MASK = 0xFFFFFFFF


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
    if sampling.repetition_penalty != 1.0 and len(seen):
        logits = logits.copy()
        ids = np.fromiter((token for token in seen if token < logits.size), np.int64)
        values = logits[ids]
        penalty = np.float32(sampling.repetition_penalty)
        logits[ids] = np.where(values < 0, values * penalty, values / penalty)
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):
        raise ModelError(f"the model's logits are not finite ({logits[best]}): its weights or activations overflowed")
    if sampling.temperature == 0:
        return best
    kept = np.cumsum(probabilities(logits, sampling))
    return int(np.searchsorted(kept, uniform * kept[-1], side="right"))


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What temperature, top-k, top-p and min-p leave of softmax(logits), (V,) float64, summing to 1."""
    # Relative to the largest first: a tiny temperature then gives -inf, not an overflow.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    if sampling.top_k and sampling.top_k < scaled.size:
        threshold = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled[scaled < threshold] = -np.inf
    kept = np.exp(scaled)
    kept /= kept.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = np.sort(kept)[::-1]
        count = int(np.searchsorted(np.cumsum(ordered), sampling.top_p))
        kept[kept < ordered[min(count, ordered.size - 1)]] = 0
    if sampling.min_p:
        kept[kept < sampling.min_p * kept.max()] = 0
    return kept / kept.sum()


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-24, from (seed, stream, step) and nothing else.

    Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), as Triton's
    `tl.philox(seed, step, stream, 0, 0)`: key (seed low, seed high), the first of its four words.
    """
    c0, c1, c2, c3 = step & _MASK, stream & _MASK, 0, 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return (c0 >> 8) * 2.0**-24


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
