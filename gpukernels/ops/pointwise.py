"""Ops on single elements and rows."""

from gpukernels.ops.checks import FLOATS, Array, check_floats, check_integers, check_shape, implementation, shape


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
        ids: (...), int32 or int64, 0 to V - 1. NumPy checks the values; torch on CUDA does not.
        weight: (V, C).
        positions: (...), the shape of ids, 0 to P - 1.
        position_weight: (P, C); goes with `positions`.
        dtype: of the result (a dtype of the arrays' own library), default weight's. The sum is
            computed in it.

    Returns:
        (..., C).

    Raises:
        TypeError: arrays of different kinds, ids not integers, or tables not floating point.
        ValueError: shapes that do not match, one of positions and position_weight alone.
        IndexError: an id or position outside its table (NumPy, and torch on the CPU).
    """
    arrays = {"ids": ids, "weight": weight}
    run = implementation("embedding", arrays, positions=positions, position_weight=position_weight)
    check_floats("embedding", weight=weight, position_weight=position_weight)
    check_integers("embedding", "ids", ids)
    if dtype is not None and getattr(dtype, "__name__", str(dtype)).removeprefix("torch.") not in FLOATS:
        raise TypeError(f"embedding: dtype must be a floating-point dtype, got {dtype!r}")
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
