"""`cross_entropy` and `cross_entropy_with_gradient` as torch ops.

The forward op of the differentiable one returns the loss, lse and the mean's divisor (empty for another
reduction); its backward op reads the logits again and folds the upstream gradient in. So the graph may be
walked twice, and nothing as large as the logits is kept between the passes.
"""

import torch

from gpukernels import torch_ops
from gpukernels.kernels import loss as kernels
from gpukernels.library.registry import define, differentiate, empty
from gpukernels.torch_ops.loss import cross_entropy_gradient


def plain_divisor(targets, weights, ignore_index):
    kept = targets != ignore_index
    return (kept.float() if weights is None else torch.where(kept, weights.float(), 0)).sum().reshape(1)


def _plain(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction):
    loss = torch_ops.cross_entropy(
        logits,
        targets,
        weights=weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
    )
    lse = torch.logsumexp(logits.float(), -1).reshape(-1)
    divisor = plain_divisor(targets, weights, ignore_index) if reduction == "mean" else empty(loss, 0)
    return loss, lse, divisor


def _fake_loss(targets, reduction):
    return empty(targets, *(targets.shape if reduction == "none" else ()), dtype=torch.float32)


def _fake(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction):
    lse, divisor = (empty(logits, n, dtype=torch.float32) for n in (targets.numel(), int(reduction == "mean")))
    return _fake_loss(targets, reduction), lse, divisor


def _backward_plain(dloss, logits, targets, weights, lse, divisor, ignore_index, label_smoothing, z_loss):
    g = dloss.reshape(-1).float() * (1 if weights is None else weights.reshape(-1).float())
    if divisor.numel():
        g = g / divisor
    dlogits = kernels.empty_rows(logits.shape, logits.dtype, logits.device)
    dx = cross_entropy_gradient(
        g.expand(targets.numel()),
        logits.float().reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        lse,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return dlogits.copy_(dx.reshape(logits.shape))


def _backward_fake(dloss, logits, targets, weights, lse, divisor, ignore_index, label_smoothing, z_loss):
    return kernels.empty_rows(logits.shape, logits.dtype, logits.device)


def _with_gradient_plain(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction, scale):
    loss, dlogits = torch_ops.cross_entropy_with_gradient(
        logits,
        targets,
        weights=weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        scale=scale,
    )
    return loss, kernels.empty_rows(logits.shape, logits.dtype, logits.device).copy_(dlogits)


def _with_gradient_fake(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction, scale):
    return _fake_loss(targets, reduction), kernels.empty_rows(logits.shape, logits.dtype, logits.device)


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"

_forward = define(
    f"cross_entropy(Tensor logits, Tensor targets, Tensor? weights, {_OPTIONS}, str reduction) "
    "-> (Tensor, Tensor, Tensor)",
    launch=kernels.cross_entropy_forward,
    plain=_plain,
    fake=_fake,
)
_backward = define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor? weights, Tensor lse, "
    f"Tensor divisor, {_OPTIONS}) -> Tensor",
    launch=kernels.cross_entropy_backward,
    plain=_backward_plain,
    fake=_backward_fake,
)
_with_gradient = define(
    f"cross_entropy_with_gradient(Tensor logits, Tensor targets, Tensor? weights, {_OPTIONS}, str reduction, "
    "Tensor? scale) -> (Tensor, Tensor)",
    launch=kernels.cross_entropy_with_gradient,
    plain=_with_gradient_plain,
    fake=_with_gradient_fake,
)


def _save(ctx, inputs, output):
    logits, targets, weights, *ctx.options, _ = inputs
    _, lse, divisor = output
    ctx.mark_non_differentiable(lse, divisor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, weights, lse, divisor)


def _differentiated(ctx, dloss, _dlse, _ddivisor):
    dlogits = _backward(dloss, *ctx.saved_tensors, *ctx.options) if ctx.needs_input_grad[0] else None
    return dlogits, None, None, None, None, None, None


differentiate(_forward, _save, _differentiated)


def cross_entropy(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    weights = None if weights is None else weights.detach()
    return _forward(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction)[0]


def cross_entropy_with_gradient(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", scale=None
):
    logits, weights, scale = (None if each is None else each.detach() for each in (logits, weights, scale))
    return _with_gradient(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction, scale)
