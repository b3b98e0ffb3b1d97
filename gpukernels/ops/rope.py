"""Rotary position embedding."""

from gpukernels.numbers import finite
from gpukernels.ops.checks import Array, check_floats, check_integers, check_shape, dtype_name, implementation, shape


def rope(
    x: Array,
    positions: Array,
    *,
    theta: float = 10000.0,
    frequencies: Array | None = None,
    interleaved: bool = False,
) -> Array:
    """Rotary position embedding: turns each pair of a head's elements by its position times its frequency.

    angle = position * frequencies[i]; the pair (a, b) becomes (a cos - b sin, b cos + a sin). Pair i of
    the first R elements is (i, i + R/2), as transformers' LLaMA has it, or (2i, 2i + 1) with
    `interleaved`. The elements from R on pass through.

    Args:
        x: (B, T, H, D), D even; queries or keys. Slices of a packed (B, T, 3, H, D) projection are read
            where they lie.
        positions: (B, T), int32 or int64, of any value; read from the device's memory. One row for a
            whole batch is `positions.expand(B, T)`.
        theta: the default frequencies are theta ** (-2i / D), R = D, computed in float32 as transformers does.
        frequencies: (R/2,) float32, 1 to D/2 of them, used instead; a constant, without a gradient.
        interleaved: which elements are a pair.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: arrays of different kinds, x not floating point, positions not integers, frequencies
            not float32.
        ValueError: shapes that do not match, an odd D, a theta that is not positive.

    Numerics: the position and the angle are rounded to float32, for every dtype of x. What follows, sine
    and cosine included, is float32 (float64 for float64 x), of any angle, with one rounding to x's dtype.
    Cost: one read of x and one write of the result. On a GPU the default frequencies are made on the
    first call with a theta, a D and a device: let that call not be one that a CUDA graph captures.
    Source: Su et al., arXiv 2104.09864.
    """
    run = implementation("rope", {"x": x, "positions": positions}, frequencies=frequencies)
    check_floats("rope", x=x)
    check_integers("rope", "positions", positions)
    if x.ndim != 4 or x.shape[3] == 0 or x.shape[3] % 2:
        raise ValueError(f"rope: x must be (B, T, H, D) with an even D of 2 or more, got {shape(x)}")
    check_shape("rope", "positions", positions, tuple(x.shape[:2]), "to match x")
    if not (finite(theta) and theta > 0):
        raise ValueError(f"rope: theta must be a number above 0, got {theta!r}")
    if frequencies is not None:
        if dtype_name(frequencies.dtype) != "float32":
            raise TypeError(f"rope: frequencies must be float32, got {dtype_name(frequencies.dtype)}")
        if frequencies.ndim != 1 or not 1 <= frequencies.shape[0] <= x.shape[3] // 2:
            raise ValueError(
                f"rope: frequencies must be (R/2,) with 1 to {x.shape[3] // 2} of them for x {shape(x)}, "
                f"got {shape(frequencies)}"
            )
    return run.rope(x, positions, theta=theta, frequencies=frequencies, interleaved=interleaved)
