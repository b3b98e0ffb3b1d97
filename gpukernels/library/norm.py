"""`layer_norm` and `rms_norm` as torch ops.

A forward op returns y, s = x + residual, mean and rstd; s is empty without a residual (an op must not
return its input), mean is empty for RMS norm.
"""

from collections.abc import Callable

import torch

from gpukernels import torch_ops
from gpukernels.kernels.norm import norm_backward, norm_forward
from gpukernels.library.registry import define, differentiate, empty, only_once


def _define_norm(name: str, *, center: bool) -> tuple[Callable, Callable]:
    """The op and its backward op."""

    def normalize(s, weight, bias, eps):
        if center:
            return torch_ops.layer_norm(s, weight, bias, eps=eps)
        return torch_ops.rms_norm(s, weight, eps=eps)

    def launch(x, weight, bias, residual, eps):
        return norm_forward(x, weight, bias, residual, eps, center=center)

    def plain(x, weight, bias, residual, eps):
        total = empty(x, 0) if residual is None else (x + residual).to(x.dtype)
        s = x if residual is None else total
        wide = s.float().reshape(-1, s.shape[-1])
        mean = wide.mean(1) if center else empty(wide, 0)
        rstd = ((wide - mean[:, None] if center else wide).square().mean(1) + eps).rsqrt()
        return normalize(s, weight, bias, eps).contiguous(), total, mean, rstd

    def fake(x, weight, bias, residual, eps):
        rows = x.shape[:-1].numel()
        mean, rstd = (empty(x, n, dtype=torch.float32) for n in (rows if center else 0, rows))
        return empty(x, *x.shape), empty(x, *(x.shape if residual is not None else (0,))), mean, rstd

    def backward_launch(dy, dtotal, s, weight, mean, rstd, needs):
        needs = dict(zip(("needs_dx", "needs_dweight", "needs_dbias"), needs, strict=True))
        return norm_backward(dy, dtotal, s, weight, mean, rstd, center=center, **needs)

    def backward_plain(dy, dtotal, s, weight, mean, rstd, needs):
        compute = torch.promote_types(s.dtype, torch.float32)
        dy, wide = (each.to(compute).reshape(-1, s.shape[-1]) for each in (dy, s))
        h = (wide - mean[:, None] if center else wide) * rstd[:, None]
        g = dy * weight
        ds = g - h * (g * h).mean(1, keepdim=True)
        ds = (ds - g.mean(1, keepdim=True) if center else ds) * rstd[:, None]
        ds = ds.reshape(s.shape) if dtotal is None else ds.reshape(s.shape) + dtotal
        results = (ds.to(s.dtype), (dy * h).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype))
        return tuple(each if need else empty(each, 0) for each, need in zip(results, needs, strict=True))

    def backward_fake(dy, dtotal, s, weight, mean, rstd, needs):
        shapes = (s.shape, weight.shape, weight.shape)
        likes = (s, weight, weight)
        return tuple(
            empty(like, *(shape if need else (0,))) for like, shape, need in zip(likes, shapes, needs, strict=True)
        )

    forward = define(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        launch=launch,
        plain=plain,
        fake=fake,
    )
    backward = define(
        f"{name}_backward(Tensor dy, Tensor? dtotal, Tensor s, Tensor weight, Tensor mean, Tensor rstd, "
        "bool[3] needs) -> (Tensor, Tensor, Tensor)",
        launch=backward_launch,
        plain=backward_plain,
        fake=backward_fake,
    )

    def save(ctx, inputs, output):
        x, weight, _, residual, _ = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)

    def differentiated(ctx, dy, dtotal, _dmean, _drstd):
        needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        s, weight, mean, rstd = ctx.saved_tensors
        if dtotal is not None and not dtotal.numel():
            dtotal = None
        if dy is None:
            dy = torch.zeros_like(s)
        needs = (needs_x or needs_residual, needs_weight, needs_bias)
        ds, dweight, dbias = backward(dy, dtotal, s, weight, mean, rstd, needs)
        return (
            ds if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            ds if needs_residual else None,
            None,
        )

    differentiate(forward, save, differentiated)
    return forward, backward


_layer_norm, _layer_norm_backward = _define_norm("layer_norm", center=True)
_rms_norm, _rms_norm_backward = _define_norm("rms_norm", center=False)


def _define_and_x(forward_op: Callable, backward_op: Callable) -> type[torch.autograd.Function]:
    """A norm of x, and x itself, which an op must not return, but a node of the graph may."""

    def differentiated(ctx, dy, dx):
        """What comes back along x is to the backward kernel what comes back along the sum with a residual."""
        if dy is None:
            return dx, None, None, None
        needs = ctx.needs_input_grad[:3]
        found = backward_op(dy, dx, *ctx.saved_tensors, needs)
        return *(each if need else None for each, need in zip(found, needs, strict=True)), None

    class AndX(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            y, _, mean, rstd = forward_op(x, weight, bias, None, eps)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y, x.view_as(x)

        backward = staticmethod(only_once(forward_op.name(), differentiated))

    return AndX


_LayerNormAndX = _define_and_x(_layer_norm, _layer_norm_backward)
_RmsNormAndX = _define_and_x(_rms_norm, _rms_norm_backward)


def layer_norm_and_x(x, weight, bias, eps):
    """y and x; the gradient of x, which must want one, is made in one launch from those of both."""
    return _LayerNormAndX.apply(x, weight, bias, eps)


def rms_norm_and_x(x, weight, eps):
    """As `layer_norm_and_x`."""
    return _RmsNormAndX.apply(x, weight, None, eps)


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    y, total, _, _ = _layer_norm(x, weight, bias, residual, eps)
    return y if residual is None else (y, total)


def rms_norm(x, weight, *, eps=1e-6, residual=None):
    y, total, _, _ = _rms_norm(x, weight, None, residual, eps)
    return y if residual is None else (y, total)
