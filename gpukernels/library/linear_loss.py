"""`linear_cross_entropy` as a torch op.

The forward op returns the loss, the mean's divisor, and the gradients of the losses' sum, which its backward
op scales; what is not needed is empty. For the reduction "none" the backward op makes the gradients.
"""

import torch
import torch.nn.functional as F

from gpukernels import torch_ops
from gpukernels.kernels import linear_loss as kernels
from gpukernels.library.loss import plain_divisor
from gpukernels.library.registry import autocast, define, differentiate, empty
from gpukernels.torch_ops.loss import cross_entropy_gradient


def _plain_gradients(g, hidden, weight, targets, ignore_index, label_smoothing, z_loss):
    """dhidden and float32 dweight of the losses times g (M,), through all logits."""
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    x = F.linear(rows, weight).float()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    dx = cross_entropy_gradient(g, x, targets.reshape(-1), torch.logsumexp(x, -1), **options)
    return (dx @ weight.float()).to(hidden.dtype).reshape(hidden.shape), dx.T @ rows.float()


def _plain(
    hidden, weight, targets, weights, ignore_index, label_smoothing, z_loss, reduction, chunk,
    needs_dhidden, needs_dweight,
):  # fmt: skip
    loss = torch_ops.linear_cross_entropy(
        hidden, weight, targets, weights=weights, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, reduction=reduction,
    )  # fmt: skip
    divisor, dhidden, dweight = empty(loss, 0), empty(hidden, 0), empty(loss, 0)
    if reduction == "mean":
        divisor = plain_divisor(targets, weights, ignore_index)
    if reduction != "none" and (needs_dhidden or needs_dweight):
        g = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.float()
        options = (ignore_index, label_smoothing, z_loss)
        found = _plain_gradients(g.reshape(-1), hidden, weight, targets, *options)
        dhidden, dweight = found[0] if needs_dhidden else dhidden, found[1] if needs_dweight else dweight
    return loss, divisor, dhidden, dweight


def _backward_plain(
    dloss, hidden, weight, targets, weights, divisor, dhidden, dweight, ignore_index, label_smoothing, z_loss,
    reduction, chunk, needs_dhidden, needs_dweight,
):  # fmt: skip
    if reduction == "none":
        g = dloss.reshape(-1) * (1 if weights is None else weights.reshape(-1).float())
        options = (ignore_index, label_smoothing, z_loss)
        dhidden, dweight = _plain_gradients(g, hidden, weight, targets, *options)
    else:
        scale = torch.where(divisor == 0, 0, dloss / divisor) if divisor.numel() else dloss
        dhidden, dweight = dhidden.float() * scale, dweight * scale
    return (
        dhidden.to(hidden.dtype) if needs_dhidden else empty(hidden, 0),
        dweight.to(weight.dtype) if needs_dweight else empty(weight, 0),
    )


def _fake(
    hidden, weight, targets, weights, ignore_index, label_smoothing, z_loss, reduction, chunk,
    needs_dhidden, needs_dweight,
):  # fmt: skip
    loss = empty(hidden, *(targets.shape if reduction == "none" else ()), dtype=torch.float32)
    divisor = empty(hidden, int(reduction == "mean"), dtype=torch.float32)
    dhidden = empty(hidden, *(hidden.shape if needs_dhidden and reduction != "none" else (0,)))
    dweight = empty(weight, *(weight.shape if needs_dweight and reduction != "none" else (0,)), dtype=torch.float32)
    return loss, divisor, dhidden, dweight


def _backward_fake(
    dloss, hidden, weight, targets, weights, divisor, dhidden, dweight, ignore_index, label_smoothing, z_loss,
    reduction, chunk, needs_dhidden, needs_dweight,
):  # fmt: skip
    dhidden = empty(hidden, *(hidden.shape if needs_dhidden else (0,)))
    return dhidden, empty(weight, *(weight.shape if needs_dweight else (0,)))


_OPTIONS = (
    "int ignore_index, float label_smoothing, float z_loss, str reduction, int chunk, "
    "bool needs_dhidden, bool needs_dweight"
)

_forward = define(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch=kernels.linear_cross_entropy_forward,
    plain=_plain,
    fake=_fake,
)
_backward = define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, "
    f"Tensor divisor, Tensor dhidden, Tensor dweight, {_OPTIONS}) -> (Tensor, Tensor)",
    launch=kernels.linear_cross_entropy_backward,
    plain=_backward_plain,
    fake=_backward_fake,
)


def _save(ctx, inputs, output):
    hidden, weight, targets, weights, *ctx.options = inputs
    _, divisor, dhidden, dweight = output
    ctx.mark_non_differentiable(divisor, dhidden, dweight)
    ctx.set_materialize_grads(False)  # else zeros are made for all three
    ctx.save_for_backward(hidden, weight, targets, weights, divisor, dhidden, dweight)


def _differentiated(ctx, dloss, _ddivisor, _ddhidden, _ddweight):
    # The forward op may have been told that fewer are needed: then there is nothing to scale.
    *options, made_dhidden, made_dweight = ctx.options
    needs = ctx.needs_input_grad[0] and made_dhidden, ctx.needs_input_grad[1] and made_dweight
    dhidden, dweight = _backward(dloss, *ctx.saved_tensors, *options, *needs)
    return dhidden if needs[0] else None, dweight if needs[1] else None, *([None] * 9)


differentiate(_forward, _save, _differentiated)


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    *,
    weights=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    chunk=None,
):
    hidden, weight = autocast(hidden, weight)
    differentiated = torch.is_grad_enabled()
    return _forward(
        hidden, weight, targets, None if weights is None else weights.detach(),
        ignore_index, label_smoothing, z_loss, reduction, chunk or 0,
        differentiated and hidden.requires_grad, differentiated and weight.requires_grad,
    )[0]  # fmt: skip
