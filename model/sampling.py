"""From logits to a token: penalties, thresholds, and a draw that a seed fixes.

`gpukernels.sample` says what is chosen, and does it; here are the settings as a user writes them, and
as a decoder holds them.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from gpukernels.numbers import finite, whole
from model.device import Device
from model.errors import ModelError
from model.parameters import padded_rows

#: The arguments of `gpukernels.sample` that go together.
DRAWING, FILTERS, PENALTY = (
    ("temperature", "seed", "stream", "step"),
    ("top_k", "top_p", "min_p"),
    ("repetition_penalty", "seen"),
)

_LEAST, _MOST = 2.0**-126, 2.0**126  # normal in float32, and so is their reciprocal


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

        require("temperature", finite(self.temperature) and self.temperature >= 0, "a number, 0 or more")
        top_k = self.top_k
        require("top_k", top_k is None or (whole(top_k) and top_k >= 0), "a whole number, 0 or more, or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(name, value is None or (finite(value) and 0 <= value <= 1), "a number from 0 to 1, or None")
        penalty = self.repetition_penalty
        require("repetition_penalty", finite(penalty) and penalty > 0, "a number above 0")


class SamplingState:
    """What choosing a token takes of every row of a decoder, on its device: a step asks the host nothing."""

    def __init__(self, device: Device, rows: int, vocabulary: int):
        self.vocabulary = vocabulary
        self._device = device
        self._settings = [Sampling()] * rows
        dtypes = dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "float32")
        dtypes |= {"top_k": "int32", "seed": "int64", "stream": "int32", "step": "int32"}
        self._arrays = {name: device.zeros((rows,), dtype) for name, dtype in dtypes.items()}

    def set(
        self, row: int, sampling: Sampling, *, seed: int, stream: int, step: int, seen: Collection[int] = ()
    ) -> None:
        """How row `row` goes on; see `Decoder.start`."""
        self._settings[row] = sampling
        values = {
            "temperature": _normal(sampling.temperature) if sampling.temperature else 0.0,
            "top_k": min(sampling.top_k or 0, self.vocabulary),
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": _normal(sampling.repetition_penalty),
            "seed": seed - 2**64 if seed >= 2**63 else seed,  # the same bits
            "stream": stream,
            "step": step,
        }
        for name, value in values.items():
            self._arrays[name][row : row + 1] = value  # see `Cache.hold`
        if sampling.repetition_penalty != 1.0:
            if "seen" not in self._arrays:
                memory = self._device.zeros((len(self._settings), padded_rows(self.vocabulary)), "bool")
                self._arrays["seen"] = memory[:, : self.vocabulary]
            self._arrays["seen"][row] = False
            self._arrays["seen"][row, [token for token in seen if token < self.vocabulary]] = True

    def move(self, source: int, target: int) -> None:
        """Copies row `source` over row `target`."""
        self._settings[target] = self._settings[source]
        for array in self._arrays.values():
            array[target] = array[source]

    def needed(self, start: int, stop: int) -> tuple[str, ...]:
        """The arguments of `gpukernels.sample` that one of the rows `start` to `stop` needs."""
        rows, names = self._settings[start:stop], []
        if any(each.temperature for each in rows):
            names += DRAWING
            names += ["top_k"] * any(each.top_k for each in rows)
            names += ["top_p"] * any(each.top_p is not None for each in rows)
            names += ["min_p"] * any(each.min_p is not None for each in rows)
        if any(each.repetition_penalty != 1.0 for each in rows):
            names += PENALTY
        return tuple(names)

    def arrays(self, names: Iterable[str], start: int, stop: int) -> dict[str, Any]:
        """These arguments, for rows `start` to `stop`; what a row has not asked for changes nothing of it."""
        return {name: self._arrays[name][start:stop] for name in names}


def _normal(value: float) -> float:
    """A number above 0 that is one in float32 too."""
    return min(max(value, _LEAST), _MOST)
