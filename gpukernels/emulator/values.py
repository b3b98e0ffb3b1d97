"""Arithmetic of PTX on arrays with one element for each thread.

Registers are unsigned integers of their width; these functions take and give the types that an instruction names.
Nothing is changed in place: a register's array may be another's too.
"""

import numpy as np

F32_TINY = np.float32(2.0**-126)


def bits(x, count: int, kind) -> np.ndarray:
    """A value as a register: unsigned integers (or truth values), one for each of `count` threads."""
    x = np.asarray(x)
    if x.ndim == 0:
        x = np.full(count, x)
    return x if x.dtype == kind else x.view(kind)


def flush(x: np.ndarray) -> np.ndarray:
    """`.ftz`: what is below the smallest normal number is a zero of its sign."""
    return np.where(np.abs(x) < F32_TINY, np.copysign(np.float32(0), x), x)


def fma(a, b, c):
    """A product of two float32 is exact in float64, the sum is rounded there and then again: rarely to a neighbour."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """Rounded to nearest, ties to even; NaN is 0x7FFF."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_integer(x, dtype, round_):
    """Saturated; NaN is 0."""
    info = np.iinfo(dtype)
    whole = round_(np.float64(x))
    inside = np.where(np.isnan(whole), 0.0, np.clip(whole, float(info.min), float(info.max)))
    # float64 has no 2^63 - 1: what is clipped to 2^63 is set by hand.
    result = np.where(inside >= float(info.max), 0.0, inside).astype(dtype)
    return np.where(inside >= float(info.max), dtype(info.max), result)


def halves(x):
    """The lower and the upper 16 bits."""
    return x.astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def joined(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def divide(a, b):
    """Truncated towards zero; by zero all bits are set."""
    zero = b == 0
    quotient = a // np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return np.where(zero, ~a.dtype.type(0), quotient)


def remainder(a, b):
    return a - divide(a, b) * b


def bit_field(a, position: int, length: int):
    """`bfe`: `length` bits from `position` on, all inside the word, with the sign that a's type has."""
    width = a.dtype.itemsize * 8
    return (a << a.dtype.type(width - position - length)) >> a.dtype.type(width - length)


def funnel(low, high, by, left: bool):
    """`shf.wrap`: 32 bits of 64 that are shifted."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    by = by.astype(np.uint64) & np.uint64(31)
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def permute(a, b, selector):
    """`prmt.b32` in its generic mode."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(both.shape, np.uint32)
    for i in range(4):
        nibble = (np.uint64(selector) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(nibble >= 8, sign, byte)
        result |= (byte << np.uint64(8 * i)).astype(np.uint32)
    return result


def high_product(a, b):
    """The upper 32 bits of a product of 32 bits."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (np.asarray(a, wide) * np.asarray(b, wide) >> wide(32)).astype(a.dtype)


#: Instructions that are not exact: the function, and the largest relative error by the PTX ISA 8.7.
_APPROXIMATE = {
    "ex2": (np.exp2, 2.0**-22.5),
    "lg2": (np.log2, 2.0**-22),
    "rcp": (np.reciprocal, 2.0**-24),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9),
    "sqrt": (np.sqrt, 2.0**-23),
    "tanh": (np.tanh, 2.0**-11),
}


class Approximate:
    """Functions that a GPU computes to within a stated error; here the error is drawn, within the statement.

    It depends on the argument alone, as on a GPU, and a result that is a power of two is exact.
    """

    def __init__(self, seed: int | None = 0):
        """seed: of the errors; None: there are none but of rounding."""
        self._seed = seed

    def of(self, name: str, x) -> np.ndarray:
        """An instruction (a key of `_APPROXIMATE`) on x, float32."""
        function, largest = _APPROXIMATE[name]
        value = function(np.float64(x))
        if self._seed is not None:
            word = np.float32(x).view(np.uint32).astype(np.uint64) + np.uint64(self._seed)
            part = (word * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) * 2.0**-52 - 1  # from -1 to 1
            exact = np.frexp(value)[0] == 0.5
            value = np.where(exact, value, value * (1 + largest * part))
        return value.astype(np.float32)

    def divide(self, a, b) -> np.ndarray:
        """`div.full`, which may be off by 2 ulp: by the reciprocal, with the scale of b apart, which would overflow."""
        part, power = np.frexp(np.float64(b))
        scaled = np.ldexp(np.float64(a) * self.of("rcp", part), -power)
        # By 0, infinities and NaN: as the quotient is.
        return np.where(np.isfinite(part) & (part != 0), scaled, np.float64(a) / np.float64(b)).astype(np.float32)
