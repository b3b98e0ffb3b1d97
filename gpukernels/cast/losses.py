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
    scratch = np.empty((4, min(CHUNK, source.size)), np.int32)
    for start in range(0, source.size, CHUNK):
        values = widened(source[start : start + CHUNK], format)
        total += _count(values, _SMALLEST_NORMAL[format], _RANGES[dtype], scratch[:, : values.size])
    return total


def _count(values: np.ndarray, source_normal: int, to: _Range, scratch: np.ndarray) -> Losses:
    bits, (magnitude, distance, other, error) = values.view(np.int32), scratch
    error = error.view(np.float32)
    np.bitwise_and(bits, 0x7FFF_FFFF, out=magnitude)
    largest = int(magnitude.max())
    smallest = int(np.subtract(magnitude, 1, out=other).view(np.uint32).min()) + 1  # but zero
    np.bitwise_and(bits, (1 << to.dropped) - 1, out=distance)
    np.subtract(1 << to.dropped, distance, out=other)
    np.minimum(distance, other, out=distance)
    counts = {}
    if largest >= to.infinite:
        counts["nonfinite"] = values.size - _below(magnitude, 0x7F80_0000)
        counts["overflowed"] = values.size - _below(magnitude, to.infinite) - counts["nonfinite"]
        np.copyto(distance, 0, where=magnitude >= to.infinite)
    if smallest < to.normal:
        counts["underflowed"] = _below(magnitude, to.zero + 1) - _below(magnitude, 1)
        first = min(max(to.zero + 1, source_normal), to.rounds_to_normal)
        counts["subnormal"] = _below(magnitude, to.rounds_to_normal) - _below(magnitude, first)
        np.copyto(distance, 0, where=magnitude < to.normal)
    # By the mantissa, a number from 1 to 2: both are exact, so only the division rounds.
    np.bitwise_and(bits, 0x007F_FFFF, out=other)
    np.bitwise_or(other, 0x3F80_0000, out=other)
    np.copyto(error, distance, casting="same_kind")
    np.divide(error, other.view(np.float32), out=error)
    return Losses(values.size, **counts, error=float(error.max()) * 2.0**-23)


def _below(magnitude: np.ndarray, place: int) -> int:
    return int(np.count_nonzero(magnitude < place))
