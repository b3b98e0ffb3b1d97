"""Matrix products, and what is fused with them."""

from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_norm,
    check_product,
    check_shape,
    dtype_name,
    implementation,
    shape,
)

#: Norms of `norm_linear`: `layer_norm` and `rms_norm`.
NORMS = ("layer", "rms")


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """y = activation(x @ weight.T + bias) + residual.

    Args:
        x: (..., K).
        weight: (N, K), any strides; (K, N) storage is passed as its transposed view.
        bias: (N,) or None.
        activation: one of `ACTIVATIONS`, or None.
        residual: (..., N), added last, or None.

    Returns:
        (..., N), of x's dtype.

    Raises:
        TypeError: arrays of different kinds, or not floating point.
        ValueError: a shape that does not match, or an unknown activation.

    Cost: 2 M N K flops for M rows; with few rows, one read of the weight.
    """
    run = implementation("linear", {"x": x, "weight": weight}, bias=bias, residual=residual)
    check_floats("linear", x=x, weight=weight, bias=bias, residual=residual)
    check_product("linear", x, weight, bias, activation)
    if residual is not None:
        check_shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]), "to match the result")
    return run.linear(x, weight, bias, activation=activation, residual=residual)


def norm_linear(
    x: Array,
    norm_weight: Array,
    norm_bias: Array | None,
    weight: Array,
    bias: Array | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    activation: str | None = None,
    with_x: bool = False,
) -> Array | tuple[Array, Array]:
    """activation(h @ weight.T + bias), what a decode step fuses, with h the norm of x.

    h = layer_norm(x, norm_weight, norm_bias, eps=eps), or rms_norm(x, norm_weight, eps=eps) with norm="rms".

    Args:
        x: (..., C).
        norm_weight: (C,).
        norm_bias: (C,) or None; None with norm="rms", which has none.
        weight: (N, C).
        bias: (N,) or None.
        norm: one of `NORMS`: "layer" or "rms".
        eps: added to the variance, or to the mean of squares; not negative. The default is `layer_norm`'s for both.
        activation: one of `ACTIVATIONS`, or None.
        with_x: also return x, for the residual connection around what is computed here: the gradient that comes
            back along it is added where the norm's is made, and not by a pass of its own.

    Returns:
        y (..., N), of x's dtype; or (y, x).

    Raises:
        TypeError, ValueError: as `layer_norm`, `rms_norm` and `linear` do; an unknown norm, a norm_bias with "rms".

    Numerics: h is rounded to x's dtype once, behind the product with norm_weight.
    """
    arrays = {"x": x, "norm_weight": norm_weight, "weight": weight}
    run = implementation("norm_linear", arrays, norm_bias=norm_bias, bias=bias)
    check_floats("norm_linear", **arrays, norm_bias=norm_bias, bias=bias)
    if norm not in NORMS:
        raise ValueError(f"norm_linear: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "rms" and norm_bias is not None:
        raise ValueError(f"norm_linear: norm_bias must be None with norm='rms', got {shape(norm_bias)}")
    check_norm("norm_linear", x, norm_weight, norm_bias, eps, "norm_weight", "norm_bias")
    check_product("norm_linear", x, weight, bias, activation)
    options = {"norm": norm, "eps": eps, "activation": activation, "with_x": with_x}
    return run.norm_linear(x, norm_weight, norm_bias, weight, bias, **options)


def matmul(a: Array, b: Array) -> Array:
    """The matrix product a @ b, batched over equal leading dimensions.

    Args:
        a: (..., M, K).
        b: (..., K, N) with the same leading dimensions, or (K, N) for all of them.

    Returns:
        (..., M, N), of a's dtype; float16 and bfloat16 are accumulated in float32.

    Raises:
        TypeError: arrays of different kinds or dtypes, or not floating point.
        ValueError: shapes that do not multiply.
    """
    run = implementation("matmul", {"a": a, "b": b})
    check_floats("matmul", a=a, b=b)
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: b must have a's dtype {dtype_name(a.dtype)}, got {dtype_name(b.dtype)}")
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: a and b must have 2 dimensions or more, got {shape(a)} and {shape(b)}")
    if b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"matmul: the leading dimensions of a and b must be equal, got {shape(a)} and {shape(b)}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: b must be (..., {a.shape[-1]}, N) to match a {shape(a)}, got {shape(b)}")
    return run.matmul(a, b)
