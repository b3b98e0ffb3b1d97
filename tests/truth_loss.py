"""Losses beside `gpukernels.verify.truth_loss`, with their gradients."""

import numpy as np
import torch

import gpukernels
from gpukernels.verify.compare import host
from gpukernels.verify.truth import TRUTHS, bound
from gpukernels.verify.truth_loss import true_divisor, true_gradients, true_linear_loss

REDUCTIONS = ["mean", "sum", "none"]
#: By name: options of a loss.
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "z": {"z_loss": 0.02},
    "all": {"label_smoothing": 0.3, "z_loss": 0.5},
}


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
    truth = TRUTHS["cross_entropy"](**before, reduction=reduction, **options)
    assert (
        abs(host(loss) - truth.value) <= bound(str(loss.dtype).removeprefix("torch."), truth.length, truth.magnitude)
    ).all()
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

    upstream = np.random.default_rng(5).standard_normal(loss.shape)
    dloss = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    given = {name: host(x) for name, x in arrays.items()}
    truths = true_linear_loss(dtype, **given, reduction=reduction, upstream=host(dloss), **options)
    assert str(loss.dtype) == ("torch.float64" if dtype == "float64" else "torch.float32")
    found = torch.autograd.grad(loss, [leaves[name] for name in names], dloss)
    for name, result in zip(["loss", *names], [loss, *found], strict=True):
        value, magnitude, length, _ = truths[name]
        if name != "loss":
            assert result.dtype == arrays[name].dtype
        # The logits are rounded to the inputs' dtype.
        error, limit = abs(host(result) - value), bound(dtype, length, magnitude)
        assert (error <= limit).all(), f"{name} is off by {np.max(error / limit)} times the bound"
