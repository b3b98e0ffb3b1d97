"""What the losses should come to, and their gradients, in float64."""

import numpy as np

from gpukernels.verify.truth import TRUTHS, Truth


def true_gradients(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, magnitude=None
):
    """Loss and gradient of each token by itself: two Truths, of targets' and of logits' shape.

    `magnitude` is that of the logits, theirs unless they come from sums.
    """
    V = logits.shape[-1]
    kept = targets != ignore_index
    logits = np.where(kept[..., None], logits, 0.0)
    weights = np.where(kept, 1.0 if weights is None else weights, 0.0)
    lse = np.logaddexp.reduce(logits, -1)
    aim = (np.arange(V) == targets[..., None]) * (1 - label_smoothing) + label_smoothing / V
    terms = np.where(aim == 0, 0.0, aim * np.where(aim == 0, 0.0, lse[..., None] - logits))
    value = weights * (terms.sum(-1) + z_loss * lse**2)
    # exp(x) is off by the rounding of its argument, which is as large as a logit, and so are p and lse.
    magnitude = abs(np.where(np.isfinite(logits), logits, 0.0)) if magnitude is None else magnitude
    size = 1 + np.log(V) + np.max(magnitude, -1)
    loss = Truth(value, abs(weights) * (2 * size + 3 * z_loss * size**2), V)
    p = np.exp(logits - lse[..., None])
    dx = weights[..., None] * (p * (1 + 2 * z_loss * lse[..., None]) - aim)
    size = size[..., None]
    dx_size = abs(weights)[..., None] * (p * (1 + size) * (1 + 4 * z_loss * size) + aim)
    return loss, Truth(np.where(kept[..., None], dx, 0.0), dx_size, V)


def true_divisor(targets, weights=None, ignore_index=-100):
    kept = targets != ignore_index
    return (kept if weights is None else weights[kept]).sum()


def true_cross_entropy(logits, targets, *, weights=None, ignore_index=-100, reduction="mean", **options):
    loss, _ = true_gradients(logits, targets, weights=weights, ignore_index=ignore_index, **options)
    if reduction == "none":
        return loss
    divisor = true_divisor(targets, weights, ignore_index) if reduction == "mean" else 1.0
    length = loss.length + targets.size
    with np.errstate(invalid="ignore", divide="ignore"):
        return Truth(np.asarray(loss.value.sum() / divisor), loss.magnitude.sum() / abs(divisor), length)


TRUTHS["cross_entropy"] = true_cross_entropy


def true_linear_loss(dtype, hidden, weight, targets, *, weights=None, reduction="mean", upstream=1.0, **options):
    """Loss and gradients of `linear_cross_entropy` with logits of `dtype`: {"loss", "hidden", "weight"}: Truths.

    `upstream` is the gradient of the loss, () or of targets' shape for the reduction "none".
    """
    logits, sizes = np.einsum("...c,vc->...v", hidden, weight), np.einsum("...c,vc->...v", abs(hidden), abs(weight))
    each, dx = true_gradients(logits, targets, weights=weights, **options, magnitude=sizes)
    value, magnitude, divisor = each.value, each.magnitude, 1.0
    if reduction == "mean":
        divisor = true_divisor(targets, weights, options.get("ignore_index", -100))
    length = hidden.shape[-1] + len(weight) + targets.size
    with np.errstate(invalid="ignore", divide="ignore"):
        if reduction != "none":
            value, magnitude = np.asarray(value.sum() / divisor), magnitude.sum() / abs(divisor)
        g = np.broadcast_to(0.0 if divisor == 0 else upstream / divisor, targets.shape)[..., None]
    # float16's numbers below the normal ones are 2**-24 apart, wherever one is stored.
    dx_value, dx_size = g * dx.value, abs(g) * (dx.magnitude + (2.0**-13 if dtype == "float16" else 0))

    def by_token(x):
        return x.reshape(targets.size, x.shape[-1])

    of_weight = ("nv,nc->vc", by_token(dx_value), by_token(hidden)), (by_token(dx_size), by_token(abs(hidden)))
    return {
        "loss": Truth(value, magnitude, length, wide=True),
        "hidden": Truth(dx_value @ weight, dx_size @ abs(weight), length),
        "weight": Truth(np.einsum(*of_weight[0]), np.einsum("nv,nc->vc", *of_weight[1]), length),
    }
