"""Norms over the last dimension."""

from gpukernels.ops.checks import Array, check_floats, check_norm, check_shape, implementation


def layer_norm(
    x: Array, weight: Array, bias: Array | None = None, *, eps: float = 1e-5, residual: Array | None = None
) -> Array | tuple[Array, Array]:
    """Layer norm over the last dimension, with an optional residual add in front of it.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + residual, and the biased
    variance.

    Args:
        x: (..., C).
        weight: (C,), the scale.
        bias: (C,), the shift, or None.
        eps: added to the variance; not negative.
        residual: (..., C), the shape of x. With it, the sum is returned too.

    Returns:
        y, of x's shape and dtype; with `residual`, the pair (y, s).

    Raises:
        TypeError: arrays of different kinds, or not floating point.
        ValueError: a shape that does not match, or a negative eps.

    Cost: one read of each input and one write of each output. Source: Ba et al., arXiv 1607.06450.
    """
    run = implementation("layer_norm", {"x": x, "weight": weight}, bias=bias, residual=residual)
    check_floats("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    check_norm("layer_norm", x, weight, bias, eps, "weight", "bias")
    if residual is not None:
        check_shape("layer_norm", "residual", residual, tuple(x.shape), "to match x")
    return run.layer_norm(x, weight, bias, eps=eps, residual=residual)


def rms_norm(
    x: Array, weight: Array, *, eps: float = 1e-6, residual: Array | None = None
) -> Array | tuple[Array, Array]:
    """RMS norm over the last dimension, with an optional residual add in front of it.

    y = s / sqrt(mean(s^2) + eps) * weight, with s = x + residual.

    Args:
        x: (..., C).
        weight: (C,), the scale.
        eps: added to the mean of squares; not negative.
        residual: (..., C), the shape of x. With it, the sum is returned too.

    Returns:
        y, of x's shape and dtype; with `residual`, the pair (y, s).

    Raises:
        TypeError: arrays of different kinds, or not floating point.
        ValueError: a shape that does not match, or a negative eps.

    Numerics: the product with the weight is taken before the one rounding to x's dtype.
    Cost: one read of each input and one write of each output. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    run = implementation("rms_norm", {"x": x, "weight": weight}, residual=residual)
    check_floats("rms_norm", x=x, weight=weight, residual=residual)
    check_norm("rms_norm", x, weight, None, eps, "weight", "bias")
    if residual is not None:
        check_shape("rms_norm", "residual", residual, tuple(x.shape), "to match x")
    return run.rms_norm(x, weight, eps=eps, residual=residual)
