"""Timing several ways of doing one thing so that the comparison holds on a noisy machine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_PAUSE = 0.5  # seconds


@dataclass(frozen=True)
class Times:
    """Seconds of each round, in order: round i of every provider ran side by side."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    def speedup(self, other: "Times") -> float:
        """How many times faster than `other`: the median of the ratios round by round."""
        return float(np.median(np.divide(other.seconds, self.seconds)))


def interleaved(
    runs: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warmup: int = 1,
    pause: float = _PAUSE,
    faults: dict[str, Exception] | None = None,
) -> dict[str, Times]:
    """Runs each once a round, in turn, so that the machine's moods fall on all of them alike.

    A run returns the seconds that it took. Each begins after a pause: a runtime's threads go on spinning
    for a while when it has answered (OpenMP's for 200 ms), and would hold the cores of the next one. A GPU
    needs none.

    Args:
        faults: gets what a run raises, by its name; it has no more turns then, and no times. None: that ends all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name in list(seconds):
            time.sleep(pause)
            try:
                elapsed = runs[name]()
            except Exception as fault:
                if faults is None:
                    raise
                faults[name] = fault
                del seconds[name]
                continue
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Times(tuple(values)) for name, values in seconds.items()}
