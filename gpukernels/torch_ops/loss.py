"""Losses over a vocabulary, with all logits in memory."""

import torch
import torch.nn.functional as F


def cross_entropy(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    flat = targets.reshape(-1).long()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(x, flat, **options, reduction="none")
    kept = flat != ignore_index
    if z_loss:
        loss = loss + z_loss * torch.where(kept, torch.logsumexp(x, -1).square(), 0)
    counted = kept.to(x.dtype)
    if weights is not None:
        counted = torch.where(kept, weights.detach().reshape(-1).to(x.dtype), 0)
        loss = torch.where(kept, loss * counted, 0)
    if reduction == "none":
        return loss.reshape(targets.shape)
    return mean(loss.sum(), counted.sum()) if reduction == "mean" else loss.sum()


def mean(total, divisor):
    """total / divisor. Over nothing it is NaN, and its gradient 0: NaN weights would be all that is left of a step."""
    nothing = divisor == 0
    return torch.where(nothing, torch.nan, total / torch.where(nothing, 1, divisor))


def cross_entropy_with_gradient(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", scale=None
):
    logits = logits.detach()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = cross_entropy(logits, targets, weights=weights, **options, reduction=reduction)
    x = logits.to(loss.dtype).reshape(-1, logits.shape[-1])
    g = torch.ones_like(targets, dtype=loss.dtype).reshape(-1)
    if weights is not None:
        g = weights.detach().reshape(-1).to(loss.dtype)
    if reduction == "mean":
        g = g / torch.where(targets.reshape(-1) != ignore_index, g, 0).sum()
    if scale is not None:
        g = g * scale.reshape(())
    dlogits = cross_entropy_gradient(g, x, targets.reshape(-1), torch.logsumexp(x, -1), **options)
    return loss, dlogits.to(logits.dtype).reshape(logits.shape)


def cross_entropy_gradient(g, x, targets, lse, *, ignore_index, label_smoothing, z_loss):
    """g (M,) times the gradient of each token's loss by its logits x (M, V), written out."""
    kept = targets != ignore_index
    on_target = kept.to(x.dtype) * (1 - label_smoothing)
    dx = torch.exp(x - lse[:, None]) * (1 + 2 * z_loss * lse[:, None]) - label_smoothing / x.shape[-1]
    dx = dx.scatter_add(1, torch.where(kept, targets, 0).long()[:, None], -on_target[:, None])
    return torch.where(kept[:, None], dx * g[:, None], 0)
