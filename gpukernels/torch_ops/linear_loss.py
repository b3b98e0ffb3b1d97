"""Linear logits and their cross entropy: plainly, and on the CPU in float32 some tokens at a time.

Training on the CPU is what the second way is for: 8192 tokens of 50257 words have 1.6 GB of logits, three times
over with their gradient.
"""

import torch
import torch.nn.functional as F

from gpukernels.torch_ops.loss import cross_entropy, mean
from gpukernels.torch_ops.matmul import linear

_ROWS = 512  # tokens at a time: few enough for 4096 words to stay in the cache


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
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    by_parts = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and reduction != "none" and targets.numel()
    if not by_parts or torch.is_autocast_enabled("cpu"):  # which makes the products in 16 bits
        return cross_entropy(linear(hidden, weight), targets, weights=weights, **options, reduction=reduction)
    rows, flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1).long()
    kept = flat != ignore_index
    g = kept.to(rows.dtype) if weights is None else torch.where(kept, weights.detach().reshape(-1).to(rows.dtype), 0)
    differentiated = torch.is_grad_enabled()  # which `needs_input_grad` does not know
    needs = differentiated and rows.requires_grad, differentiated and weight.requires_grad
    loss = _Sum.apply(rows, weight, flat, g, ignore_index, label_smoothing, z_loss, chunk or _ROWS, *needs)
    return mean(loss, g.sum()) if reduction == "mean" else loss


class _Sum(torch.autograd.Function):
    """The sum of g (M,) times the losses; the gradients are made beside them, while the logits are there."""

    @staticmethod
    def forward(ctx, rows, weight, targets, g, ignore_index, label_smoothing, z_loss, chunk, needs_rows, needs_weight):
        drows = torch.empty_like(rows) if needs_rows else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        loss = rows.new_zeros(())
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            x, scale = F.linear(rows[part], weight), g[part, None]
            lse = torch.logsumexp(x, -1, keepdim=True)
            # Minus the logit of the target, which is looked up with a check.
            picked = F.nll_loss(x, targets[part], ignore_index=ignore_index, reduction="none")[:, None]
            each = lse + (1 - label_smoothing) * picked + z_loss * lse.square()
            if label_smoothing:
                each -= label_smoothing * x.mean(-1, keepdim=True)
            loss += torch.where(scale == 0, 0, each * scale).sum()
            if not needs_rows and not needs_weight:
                continue
            dx = x.sub_(lse).exp_()
            if z_loss:
                dx.mul_(1 + 2 * z_loss * lse)
            if label_smoothing:
                dx.sub_(label_smoothing / len(weight))
            target = torch.where(targets[part] == ignore_index, 0, targets[part])[:, None]
            dx.scatter_add_(1, target, torch.full_like(lse, label_smoothing - 1)).mul_(scale)
            dx[scale[:, 0] == 0] = 0  # where the logits are not finite too
            if needs_rows:
                torch.mm(dx, weight, out=drows[part])
            if needs_weight:
                dweight.addmm_(dx.T, rows[part])
        ctx.save_for_backward(drows, dweight, rows, weight, targets, g)
        ctx.options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
        return loss

    @staticmethod
    def backward(ctx, dloss):
        *made, rows, weight, targets, g = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: what was made is without its own graph
            loss = cross_entropy(linear(rows, weight), targets, weights=g, **ctx.options, reduction="sum")
            needed = [each for each, need in zip((rows, weight), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(loss, needed, dloss, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:2]), *([None] * 8)
        return *(None if each is None else each * dloss for each in made), *([None] * 8)
