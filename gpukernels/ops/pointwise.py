"""Ops on single elements and rows."""

from gpukernels.ops.checks import (
    FLOATS,
    Array,
    check_floats,
    check_integers,
    check_shape,
    dtype_name,
    implementation,
    shape,
)


def embedding(
    ids: Array,
    weight: Array,
    *,
    positions: Array | None = None,
    position_weight: Array | None = None,
    dtype=None,
) -> Array:
    """weight[ids], plus position_weight[positions] where those are given.

    Args:
        ids: (...), int32 or int64, 0 to V - 1. NumPy checks the values, and so does torch on the CPU. On
            CUDA a row outside the table is not read: it is NaN, and adds to no gradient.
        weight: (V, C).
        positions: (...), the shape of ids, 0 to P - 1.
        position_weight: (P, C); goes with `positions`.
        dtype: of the result (a dtype of the arrays' own library), default weight's. The sum is
            computed in it, or in float32 and rounded to it.

    Returns:
        (..., C).

    Raises:
        TypeError: arrays of different kinds, ids not integers, or tables not floating point.
        ValueError: shapes that do not match, one of positions and position_weight alone.
        IndexError: an id or position outside its table (NumPy, and torch on the CPU).

    Cost: one read of each row that is used and one write. A table's gradient is written whole, as sums in a
    fixed order: the same bits every time.
    """
    arrays = {"ids": ids, "weight": weight}
    run = implementation("embedding", arrays, positions=positions, position_weight=position_weight)
    check_floats("embedding", weight=weight, position_weight=position_weight)
    check_integers("embedding", "ids", ids)
    if dtype is not None:
        _check_dtype("embedding", dtype, weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight must be (V, C), got {shape(weight)}")
    if (positions is None) != (position_weight is None):
        given = "positions" if position_weight is None else "position_weight"
        raise ValueError(f"embedding: positions and position_weight go together, got only {given}")
    if positions is not None:
        check_integers("embedding", "positions", positions)
        check_shape("embedding", "positions", positions, tuple(ids.shape), "to match ids")
        if position_weight.ndim != 2 or position_weight.shape[1] != weight.shape[1]:
            raise ValueError(
                f"embedding: position_weight must be (P, {weight.shape[1]}) to match weight, "
                f"got {shape(position_weight)}"
            )
    return run.embedding(ids, weight, positions=positions, position_weight=position_weight, dtype=dtype)


def _check_dtype(op: str, dtype, array: Array) -> None:
    if getattr(dtype, "__name__", str(dtype)).removeprefix("torch.") not in FLOATS:
        raise TypeError(f"{op}: dtype must be a floating-point dtype, got {dtype!r}")
    torch_array, torch_dtype = (type(each).__module__ == "torch" for each in (array.dtype, dtype))
    if torch_array != torch_dtype:  # CuPy's arrays have NumPy's dtypes
        wanted = "torch.dtype" if torch_array else "numpy.dtype"
        raise TypeError(f"{op}: dtype must be a {wanted}, as the arrays have, got {dtype!r}")


def gelu(x: Array, *, approximate: str = "tanh") -> Array:
    """GELU: x Phi(x), Phi the normal distribution's, or its tanh form.

    "tanh": y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). "none": y = x/2 (1 + erf(x / sqrt(2))).

    Args:
        x: any shape.
        approximate: "tanh" or "none", torch's names.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: x not a floating-point array.
        ValueError: another approximation.

    Numerics: float32, rounded once. A finite x of any size gives a finite result and gradient, in NumPy and in the
    kernels (torch's own GELU on the CPU: the tanh form's gradient is NaN from 2^64 on, the other's result infinite
    from 2^127); an infinite one what the formulas make of it (minus infinity: 0 times infinity, NaN).
    Cost: one read of x and one write; backward reads x and dy again. Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    run = implementation("gelu", {"x": x})
    check_floats("gelu", x=x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu: approximate must be one of tanh, none, got {approximate!r}")
    return run.gelu(x, approximate=approximate)


def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU's pointwise half: silu(gate) * up, silu(x) = x / (1 + exp(-x)).

    Args:
        gate: (..., F).
        up: gate's shape and dtype. Both may be halves of one (..., 2F) product: `packed.chunk(2, -1)`;
            they are read where they lie.

    Returns:
        gate's shape and dtype.

    Raises:
        TypeError: arrays of different kinds or dtypes, or not floating point.
        ValueError: shapes that do not match.

    Numerics: float32, rounded once: silu(gate) is not rounded in between.
    Cost: one read of each and one write; backward reads three arrays and writes two. Source: Shazeer, arXiv 2002.05202.
    """
    run = implementation("swiglu", {"gate": gate, "up": up})
    check_floats("swiglu", gate=gate, up=up)
    check_shape("swiglu", "up", up, tuple(gate.shape), "to match gate")
    if up.dtype != gate.dtype:
        raise TypeError(f"swiglu: up must have gate's dtype {dtype_name(gate.dtype)}, got {dtype_name(up.dtype)}")
    return run.swiglu(gate, up)
