"""What a cast to fewer bits loses, counted in one pass; the device's kernel counts the same.

The counts come from the bits of a value's magnitude, as float32, against the places where a result changes
its kind. Rounding is to nearest, ties to even, so a place is the middle between two results.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpukernels.cast.host import CHUNK, widened


@dataclass(frozen=True)
class Losses:
    """What becomes of some values in another format.

    Attributes:
        values: how many there are.
        nonfinite: infinities and NaN, which stay what they are.
        overflowed: finite values that become infinite.
        underflowed: values that become zero and were not.
        subnormal: normal numbers of their own format that become subnormal ones of the other, with fewer
            significant bits.
        error: the largest relative error |y - x| / |x| of the values whose magnitude is in the other format's
            normal range and does not overflow, as the float32 nearest to it. At most half the distance of
            two numbers: 2^-11 for float16, 2^-8 for bfloat16.
    """

    values: int = 0
    nonfinite: int = 0
    overflowed: int = 0
    underflowed: int = 0
    subnormal: int = 0
    error: float = 0.0

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.values + other.values,
            self.nonfinite + other.nonfinite,
            self.overflowed + other.overflowed,
            self.underflowed + other.underflowed,
            self.subnormal + other.subnormal,
            max(self.error, other.error),
        )

    @property
    def any(self) -> bool:
        """Whether a value is lost or worth a look: rounding alone is none."""
        return bool(self.nonfinite or self.overflowed or self.underflowed or self.subnormal)


class _Range(NamedTuple):
    """Where results of a cast change their kind, as the bits of a float32's magnitude."""

    zero: int  # the largest that becomes 0
    rounds_to_normal: int  # the smallest whose result is normal
    normal: int  # the smallest normal number
    infinite: int  # the smallest that becomes infinite
    dropped: int  # bits of the mantissa that normal results have not


_RANGES = {
    "float32": _Range(0, 0x0080_0000, 0x0080_0000, 0x7F80_0000, 0),
    # 2^-25; 2^-14 (1 - 2^-11); 2^-14; 65520
    "float16": _Range(0x3300_0000, 0x387F_E000, 0x3880_0000, 0x477F_F000, 13),
    "bfloat16": _Range(0x0000_8000, 0x007F_8000, 0x0080_0000, 0x7F7F_8000, 16),
}
_SMALLEST_NORMAL = {"F32": 0x0080_0000, "BF16": 0x0080_0000, "F16": 0x3880_0000}
_MANTISSA, _ONE = 0x007F_FFFF, 0x0080_0000


def is_exact(format: str, dtype: str) -> bool:
    """Whether every number of a checkpoint's format is one of `dtype`, so that a cast loses nothing."""
    return dtype == "float32" or (format, dtype) in (("F16", "float16"), ("BF16", "bfloat16"))


def count_losses(source: np.ndarray, format: str, dtype: str) -> Losses:
    """What a cast of checkpoint values to `dtype` loses. Nothing is cast: it reads them, a chunk at a time.

    Args:
        source: the values as `FORMATS[format]`, contiguous.
        format: "F32", "F16" or "BF16".
        dtype: "float32", "float16" or "bfloat16".
    """
    source, total = source.reshape(-1), Losses()
    for start in range(0, source.size, CHUNK):
        total += _count(widened(source[start : start + CHUNK], format), _SMALLEST_NORMAL[format], _RANGES[dtype])
    return total


def _count(values: np.ndarray, source_normal: int, to: _Range) -> Losses:
    bits = values.view(np.int32)
    magnitude = bits & 0x7FFF_FFFF
    largest = int(magnitude.max())
    smallest = int((magnitude - 1).view(np.uint32).min()) + 1  # but zero
    distance = bits & ((1 << to.dropped) - 1)
    np.minimum(distance, (1 << to.dropped) - distance, out=distance)
    counts = {}
    if smallest < to.rounds_to_normal or largest >= to.infinite:
        finite = magnitude < 0x7F80_0000
        kinds = {
            "nonfinite": ~finite,
            "overflowed": (magnitude >= to.infinite) & finite,
            "underflowed": (magnitude > 0) & (magnitude <= to.zero),
            "subnormal": (magnitude > to.zero) & (magnitude >= source_normal) & (magnitude < to.rounds_to_normal),
        }
        counts = {kind: int(np.count_nonzero(places)) for kind, places in kinds.items()}
    if smallest < to.normal or largest >= to.infinite:
        distance[(magnitude < to.normal) | (magnitude >= to.infinite)] = 0
    # Both in units of the value's last place: whole numbers below 2^24, so only the division rounds.
    error = distance.astype(np.float32)
    error /= ((bits & _MANTISSA) | _ONE).astype(np.float32)
    return Losses(values.size, **counts, error=float(error.max()))
