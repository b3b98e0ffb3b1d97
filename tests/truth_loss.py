"""What the losses should come to, in float64, for `truth.check`; and gradients beside a loss."""

import numpy as np
import torch
from truth import TRUTHS, Truth, bound, host

import gpukernels

REDUCTIONS = ["mean", "sum", "none"]
#: By name: options of a loss.
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "z": {"z_loss": 0.02},
    "all": {"label_smoothing": 0.3, "z_loss": 0.5},
}


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


def draw_tokens(kind, *shape, vocabulary, ignored=(), seed=0, integer="int64", ignore_index=-100):
    """Targets of every place in the vocabulary, those at the flat positions `ignored` to be ignored."""
    targets = np.random.default_rng([seed, vocabulary]).integers(0, vocabulary, shape)
    flat = targets.reshape(-1)
    if flat.size > 1:
        flat[:2] = 0, vocabulary - 1
    flat[[i for i in ignored if i < flat.size]] = ignore_index
    return kind.ints(targets, integer)


def draw_weights(kind, *shape, seed=0):
    return kind._replace(dtype="float32").array(np.random.default_rng([seed, 7]).uniform(0.1, 2, shape))


def result_dtype(kind):
    return "float64" if kind.dtype == "float64" else "float32"


def check_with_gradient(arrays, *, reduction="mean", scale=None, **options):
    """`cross_entropy_with_gradient` gives the loss and gradient within the bound, of the right shape and dtype."""
    before = {name: host(array) for name, array in arrays.items()}
    loss, dlogits = gpukernels.cross_entropy_with_gradient(**arrays, reduction=reduction, scale=scale, **options)
    for name, array in arrays.items():
        np.testing.assert_array_equal(host(array), before[name], err_msg=f"{name} was changed")
    alone = gpukernels.cross_entropy(**arrays, reduction=reduction, **options)
    np.testing.assert_array_equal(host(loss), host(alone))
    assert loss.dtype == alone.dtype
    assert dlogits.dtype == arrays["logits"].dtype
    upstream = 1.0 if scale is None else float(host(scale).reshape(()))
    if reduction == "mean":
        upstream /= true_divisor(before["targets"], before.get("weights"), options.get("ignore_index", -100))
    check_gradient(dlogits, before, upstream, **options)


def check_gradient(dlogits, arrays, upstream, **options):
    """dlogits is upstream times the gradient of each token's loss, within the bound."""
    _, truth = true_gradients(**arrays, **options)
    upstream = np.broadcast_to(upstream, arrays["targets"].shape)[..., None]
    dtype = str(dlogits.dtype).removeprefix("torch.")
    assert tuple(dlogits.shape) == truth.value.shape
    limit = bound(dtype, truth.length + arrays["targets"].size, abs(upstream) * truth.magnitude)
    error = abs(host(dlogits) - upstream * truth.value)
    assert (error <= limit).all(), f"the gradient is off by {np.max(error / limit)} times the bound"


def check_linear(arrays, *, reduction="mean", frozen=(), **options):
    """`linear_cross_entropy` gives the loss, and autograd the gradients with any upstream gradient, in the bound."""
    names = [name for name in ("hidden", "weight") if name not in frozen]
    leaves = {name: x.detach().requires_grad_(name in names) if name != "targets" else x for name, x in arrays.items()}
    if "weights" in leaves:
        leaves["weights"].requires_grad_(False)
    loss = gpukernels.linear_cross_entropy(**leaves, reduction=reduction, **options)
    dtype = str(arrays["hidden"].dtype).removeprefix("torch.")
    options.pop("chunk", None)

    given = {name: host(x) for name, x in arrays.items()}
    hidden, weight, tokens = given.pop("hidden"), given.pop("weight"), given
    logits, sizes = np.einsum("...c,vc->...v", hidden, weight), np.einsum("...c,vc->...v", abs(hidden), abs(weight))
    each, dx = true_gradients(logits, **tokens, **options, magnitude=sizes)
    value, magnitude = each.value, each.magnitude
    divisor = 1.0
    if reduction == "mean":
        divisor = true_divisor(tokens["targets"], tokens.get("weights"), options.get("ignore_index", -100))
    if reduction != "none":
        value, magnitude = value.sum() / divisor, magnitude.sum() / divisor
    length = hidden.shape[-1] + len(weight) + tokens["targets"].size
    # The logits are rounded to the inputs' dtype.
    error, limit = abs(host(loss) - value), bound(dtype, length, magnitude)
    assert (error <= limit).all(), f"the loss is off by {np.max(error / limit)} times the bound"
    assert str(loss.dtype) == ("torch.float64" if dtype == "float64" else "torch.float32")

    upstream = np.random.default_rng(5).standard_normal(loss.shape)
    dloss = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    found = torch.autograd.grad(loss, [leaves[name] for name in names], dloss)
    g = np.broadcast_to(host(dloss) / divisor, tokens["targets"].shape)[..., None]
    # float16's numbers below the normal ones are 2**-24 apart, wherever one is stored.
    dx_value, dx_size = g * dx.value, abs(g) * (dx.magnitude + (2.0**-13 if dtype == "float16" else 0))
    for name, gradient in zip(names, found, strict=True):
        spec, other = ("...v,vc->...c", weight) if name == "hidden" else ("nv,nc->vc", hidden)
        flat = (lambda x: x) if name == "hidden" else (lambda x: x.reshape(-1, x.shape[-1]))
        other = other if name == "hidden" else flat(other)
        want, size = np.einsum(spec, flat(dx_value), other), np.einsum(spec, flat(dx_size), abs(other))
        assert gradient.dtype == arrays[name].dtype
        error, limit = abs(host(gradient) - want), bound(dtype, length, size)
        assert (error <= limit).all(), f"d{name} is off by {np.max(error / limit)} times the bound"
