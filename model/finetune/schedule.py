"""The learning rate of each optimizer step."""

import math
from dataclasses import dataclass

from gpukernels.numbers import finite, whole
from model.errors import ModelError

KINDS = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclass(frozen=True)
class Schedule:
    """The rate of step s, counted from 0 in optimizer steps; micro-batches do not count.

    Warm-up: rate (s + 1) / warmup for s < warmup, so that no step is lost at 0. Then, with
    p = (s - warmup) / (steps - warmup), 1 at most:

        constant       rate
        linear         floor + (rate - floor) (1 - p)
        cosine         floor + (rate - floor) (1 + cos(pi p)) / 2           arXiv 1608.03983
        inverse_sqrt   rate sqrt(w / (s + 1)), not below the floor; w = max(warmup, 1)   arXiv 1706.03762

    Args:
        kind: one of `KINDS`.
        rate: the largest, above 0.
        warmup: steps that lead up to it, 0 to `steps`.
        steps: of the whole run; linear and cosine would have come to the floor in the step after the last.
        floor: the smallest rate after the warm-up, 0 to `rate`.

    Raises ModelError for a value that makes no sense.
    """

    kind: str
    rate: float
    warmup: int
    steps: int
    floor: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ModelError(f"the schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not finite(self.rate) or self.rate <= 0:
            raise ModelError(f"the rate must be a number above 0, got {self.rate!r}")
        if not whole(self.steps) or self.steps < 1:
            raise ModelError(f"the steps must be a whole number, 1 or more, got {self.steps!r}")
        if not whole(self.warmup) or not 0 <= self.warmup <= self.steps:
            raise ModelError(f"the warm-up must be a whole number of steps, 0 to {self.steps}, got {self.warmup!r}")
        if not finite(self.floor) or not 0 <= self.floor <= self.rate:
            raise ModelError(f"the floor must be from 0 to the rate {self.rate}, got {self.floor!r}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.rate
        if self.kind == "inverse_sqrt":
            return max(self.floor, self.rate * math.sqrt(max(self.warmup, 1) / (step + 1)))
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.floor + (self.rate - self.floor) * left
