"""`linear`, `norm_linear` and `matmul` as torch ops. Few rows without a gradient go to `few_rows`.

A forward `linear` returns y and z = x @ weight.T + bias, which the gradient of an activation needs; z is empty
unless `save_z`.
"""

from functools import partial

import torch

from gpukernels import torch_ops
from gpukernels.kernels.matmul import long_product, product
from gpukernels.kernels.matmul_backward import linear_backward
from gpukernels.library.few_rows import few_rows
from gpukernels.library.norm import layer_norm, layer_norm_and_x, rms_norm, rms_norm_and_x
from gpukernels.library.registry import autocast, autocast_dtype, define, differentiate, empty, wants_gradient
from gpukernels.torch_ops.pointwise import ACTIVATIONS

_ATEN = torch.ops.aten

#: dz of dy and z, by activation.
_BACKWARD = {
    "gelu": _ATEN.gelu_backward,
    "gelu_new": partial(_ATEN.gelu_backward, approximate="tanh"),
    "relu": lambda dy, z: _ATEN.threshold_backward(dy, z, 0),
    "silu": _ATEN.silu_backward,
    "tanh": lambda dy, z: _ATEN.tanh_backward(dy, z.tanh()),
}


def _rows(x):
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _launch(x, weight, bias, activation, residual, save_z):
    shape = (*x.shape[:-1], len(weight))
    y, z = product(
        _rows(x),
        weight.T,
        bias=None if bias is None else bias.contiguous(),
        activation=activation,
        residual=None if residual is None else _rows(residual),
        save_z=save_z,
    )
    return y.view(shape), z.view(shape) if save_z else empty(x, 0)


def _plain(x, weight, bias, activation, residual, save_z):
    z = torch_ops.linear(x, weight, bias)
    y = z.clone() if activation is None else ACTIVATIONS[activation](z)
    y = y if residual is None else y + residual.to(x.dtype)
    return y.contiguous(), z.contiguous() if save_z else empty(x, 0)


def _fake(x, weight, bias, activation, residual, save_z):
    shape = (*x.shape[:-1], weight.shape[0])
    return empty(x, *shape), empty(x, *(shape if save_z else (0,)))


def _backward_launch(dy, z, x, weight, bias, activation, needs):
    needs = dict(zip(("needs_dx", "needs_dweight", "needs_dbias"), needs, strict=True))
    return linear_backward(dy, z, x, weight, bias, activation, **needs)


def _backward_plain(dy, z, x, weight, bias, activation, needs):
    compute = torch.promote_types(x.dtype, torch.float32)
    dy, z, wide_x, wide_weight = (each.to(compute) for each in (dy, z, x, weight))
    dz = _rows(dy if activation is None else _BACKWARD[activation](dy, z))
    results = ((dz @ wide_weight).reshape(x.shape), dz.T @ _rows(wide_x), dz.sum(0))
    likes = (x, weight, weight if bias is None else bias)
    return tuple(
        each.to(like.dtype).contiguous() if need else empty(like, 0)
        for each, like, need in zip(results, likes, needs, strict=True)
    )


def _backward_fake(dy, z, x, weight, bias, activation, needs):
    likes = (x, weight, weight if bias is None else bias)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(
        empty(like, *(shape if need else (0,))) for like, shape, need in zip(likes, shapes, needs, strict=True)
    )


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, bool save_z) -> (Tensor, Tensor)",
    launch=_launch,
    plain=_plain,
    fake=_fake,
)
_linear_backward = define(
    "linear_backward(Tensor dy, Tensor z, Tensor x, Tensor weight, Tensor? bias, str? activation, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    launch=_backward_launch,
    plain=_backward_plain,
    fake=_backward_fake,
)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.activation, residual, ctx.saved_z = inputs
    _, z = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, x, weight, bias)


def _differentiated(ctx, dy, _dz):
    if dy is None:
        return (None,) * 6
    z, x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, needs_residual, _ = ctx.needs_input_grad
    needs = (needs_x, needs_weight, needs_bias)
    if any(needs) and ctx.activation is not None and not ctx.saved_z:
        raise RuntimeError("gpukernels::linear: an activation's gradient needs save_z=True in the forward call")
    found = _linear_backward(dy, z, x, weight, bias, ctx.activation, needs) if any(needs) else (None,) * 3
    dx, dweight, dbias = (each if need else None for each, need in zip(found, needs, strict=True))
    return dx, dweight, dbias, None, dy.to(ctx.residual_dtype) if needs_residual else None, None


differentiate(_linear, _save, _differentiated)


#: Up to so many rows reading the weight is what a product costs, and `few_rows` is made for that.
FEW = 64


def _is_few(x, *others) -> bool:
    """Whether `few_rows` can have this call: it has no gradient."""
    return x.shape[:-1].numel() <= FEW and not wants_gradient(x, *others)


def linear(x, weight, bias=None, *, activation=None, residual=None):
    dtype = autocast_dtype(x)
    x, weight, bias = autocast(x, weight, bias)
    if dtype is not None and residual is not None and residual.dtype != dtype:
        # What is added to stays as wide as it is, as it does where torch adds.
        return linear(x, weight, bias, activation=activation) + residual
    if _is_few(x, weight, bias, residual):
        return few_rows(x, weight, bias, activation=activation, residual=residual)
    save_z = activation is not None and wants_gradient(x, weight, bias)
    return _linear(x, weight, bias, activation, residual, save_z)[0]


def norm_linear(
    x, norm_weight, norm_bias, weight, bias=None, *, norm="layer", eps=1e-5, activation=None, with_x=False
):  # fmt: skip
    rms = norm == "rms"
    if autocast_dtype(x) is None and _is_few(x, norm_weight, norm_bias, weight, bias):
        y = few_rows(x, weight, bias, norm=(norm_weight, norm_bias, eps, not rms), activation=activation)
        return (y, x) if with_x else y
    if with_x and wants_gradient(x):
        h, x = rms_norm_and_x(x, norm_weight, eps) if rms else layer_norm_and_x(x, norm_weight, norm_bias, eps)
    else:
        h = rms_norm(x, norm_weight, eps=eps) if rms else layer_norm(x, norm_weight, norm_bias, eps=eps)
    y = linear(h, weight, bias, activation=activation)
    return (y, x) if with_x else y


def _matmul_launch(a, b, may_split):
    if b.ndim == 2:
        y = long_product(_rows(a), b) if may_split else product(_rows(a), b)[0]
    else:
        batch = a.shape[:-2].numel()
        y, _ = product(a.reshape(batch, *a.shape[-2:]), b.reshape(batch, *b.shape[-2:]))
    return y.view(*a.shape[:-1], b.shape[-1])


def _matmul_plain(a, b, may_split):
    return torch_ops.matmul(a, b).contiguous()


def _matmul_fake(a, b, may_split):
    return empty(a, *a.shape[:-1], b.shape[-1])


#: `may_split`: the sum over K may be split by the whole shape, so that a row's bits depend on the number of rows.
_matmul = define(
    "matmul(Tensor a, Tensor b, bool may_split) -> Tensor",
    launch=_matmul_launch,
    plain=_matmul_plain,
    fake=_matmul_fake,
)


def _matmul_save(ctx, inputs, output):
    a, b, _ = inputs
    ctx.save_for_backward(a, b)


def _matmul_differentiated(ctx, dy):
    a, b = ctx.saved_tensors
    needs_a, needs_b, _ = ctx.needs_input_grad
    da = _matmul(dy, b.mT, False) if needs_a else None
    db = None
    if needs_b and b.ndim == 2:
        # One b for all leading dimensions: they are rows of the sum.
        db = _matmul(_rows(a).T, _rows(dy), True)
    elif needs_b:
        db = _matmul(a.mT, dy, False)
    return da, db, None


differentiate(_matmul, _matmul_save, _matmul_differentiated, twice=True)


def matmul(a, b):
    return _matmul(*autocast(a, b), False)
