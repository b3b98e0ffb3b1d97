"""Losses over a vocabulary."""

from gpukernels.numbers import whole
from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_integers,
    check_number,
    check_scalar,
    check_shape,
    dtype_name,
    implementation,
    shape,
)

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Array:
    """The cross entropy between the softmax of each token's logits and its target.

    With lse = log(sum_j exp(x_j)) and a = label_smoothing, a token's loss is its weight times
    (1 - a) (lse - x_target) + a (lse - mean(x)) + z_loss lse^2; an ignored token's is 0.

    Args:
        logits: (..., V). A vocabulary that is padded to a multiple of 64 is passed as the view
            logits[..., :V]; on the GPU, rows that start at multiples of 16 bytes are faster by far.
        targets: (...), int32 or int64, 0 to V - 1 or ignore_index.
        weights: (...), floating point, one for each token, or None: all 1. No gradient flows to them.
        ignore_index: the target of tokens that do not count; a whole number of up to 64 bits, in the vocabulary or not.
        label_smoothing: the share of the target's probability that is spread over the vocabulary, 0 to 1.
        z_loss: the factor of lse^2, which keeps lse near 0; not negative.
        reduction: "mean", the sum over the tokens divided by the sum of the weights of those that are not
            ignored (by their number where there are no weights); "sum"; or "none".

    Returns:
        float32 (float64 for float64 logits), of shape (), or of targets' shape for "none". The mean over no
        tokens is NaN, as torch's is.

    Raises:
        TypeError: arrays of different kinds, targets not integers, or logits or weights not floating point.
        ValueError: a shape that does not match, or an option outside its range.
        IndexError: a target that is neither in the vocabulary nor ignore_index (NumPy, and torch on the CPU).
            On the GPU nothing is read for such a target: the token's loss and its gradient are NaN.

    Numerics: sums and softmax in float32. What comes from upstream is multiplied into the gradient before its
    one rounding, so that a mean's small gradients do not underflow under a loss scale. The same input gives the
    same bits.
    Cost on the GPU, M rows of V logits of b bytes: M V b forward, 2 M V b backward; 4 bytes a row are saved.
    Where the upstream gradient is known beforehand, `cross_entropy_with_gradient` does both in 2 M V b.
    Source: Szegedy et al., arXiv 1512.00567 (smoothing); Chowdhery et al., arXiv 2204.02311 (z-loss).
    """
    run = implementation("cross_entropy", {"logits": logits, "targets": targets}, weights=weights)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
    }
    _check_logits("cross_entropy", logits)
    _check_tokens("cross_entropy", "logits", logits, targets, weights)
    _check_options("cross_entropy", **options)
    return run.cross_entropy(logits, targets, weights=weights, **options)


def cross_entropy_with_gradient(
    logits: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    scale: Array | None = None,
) -> tuple[Array, Array]:
    """The cross entropy and its gradient by the logits at once: what a training step needs.

    The gradient is that of scale * loss (of scale * sum(loss) for "none"). It is a result, not a part of
    autograd's graph: `logits.backward(dlogits)` carries it on.

    Args:
        logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction: as for `cross_entropy`.
        scale: one float32 (float64 for float64 logits), the gradient from upstream, such as a loss scale over
            the number of accumulated steps; None: 1. On the GPU it is read there.

    Returns:
        (loss, dlogits): the loss as `cross_entropy` returns it, without the scale, and the gradient, of
        logits' shape and dtype; on the GPU its rows start at multiples of 64 elements.

    Raises:
        As `cross_entropy`; TypeError or ValueError for a scale of another dtype or size.

    Cost on the GPU, M rows of V logits of b bytes: 2 M V b of memory traffic (a row's second reading finds it
    in the L2 cache), where `cross_entropy` and its backward pass have 3 M V b.
    """
    name = "cross_entropy_with_gradient"
    run = implementation(name, {"logits": logits, "targets": targets}, weights=weights, scale=scale)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
    }
    _check_logits(name, logits)
    _check_tokens(name, "logits", logits, targets, weights)
    _check_options(name, **options)
    if scale is not None:
        check_scalar(name, "scale", scale, logits)
    return run.cross_entropy_with_gradient(logits, targets, weights=weights, **options, scale=scale)


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Array:
    """cross_entropy(hidden @ weight.T, targets), without ever storing all logits.

    Args:
        hidden: (..., C), what the last block of a model gives.
        weight: (V, C), of hidden's dtype.
        targets, weights, ignore_index, label_smoothing, z_loss, reduction: as for `cross_entropy`.
        chunk: tokens whose logits are in memory at a time; None: on the GPU a power of two up to a quarter of all
            tokens, whose logits take 256 MiB to 1 GiB (of 50304 words in 16 bits, 2048 of 8192 tokens and 4096 of
            16384), and at least 128; for torch on the CPU, 512. NumPy, torch on the CPU but in float32, and there
            the reduction "none" make all logits at once.

    Returns:
        As `cross_entropy`.

    Raises:
        As `cross_entropy`; TypeError for a weight of another dtype, ValueError for a chunk below 1.

    Numerics: the logits are rounded to hidden's dtype, as `linear` rounds them; the weight's gradient is added
    up in float32, chunk after chunk, and rounded once. The gradient of a mean over no tokens is 0.
    Cost on the GPU, M tokens: 6 M C V flops with both gradients, which the forward pass makes and the backward
    pass scales. The reduction "none" makes the logits twice, 8 M C V, for each loss has its own upstream gradient.
    Memory: one chunk's logits, and both gradients, the weight's in float32.
    Source: Hsu et al., arXiv 2410.10989; Wijmans et al., arXiv 2411.09009.
    """
    op = "linear_cross_entropy"
    run = implementation(op, {"hidden": hidden, "weight": weight, "targets": targets}, weights=weights)
    check_floats(op, hidden=hidden, weight=weight)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must be (V, C) with V of 1 or more, got {shape(weight)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        want = f"(..., {weight.shape[1]}) to match weight {shape(weight)}"
        raise ValueError(f"{op}: hidden must be {want}, got {shape(hidden)}")
    if weight.dtype != hidden.dtype:
        want, came = dtype_name(hidden.dtype), dtype_name(weight.dtype)
        raise TypeError(f"{op}: weight must have hidden's dtype {want}, got {came}")
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
    }
    _check_tokens(op, "hidden", hidden, targets, weights)
    _check_options(op, **options)
    if chunk is not None and not (whole(chunk) and chunk >= 1):
        raise ValueError(f"{op}: chunk must be a whole number, 1 or more, or None, got {chunk!r}")
    return run.linear_cross_entropy(hidden, weight, targets, weights=weights, **options, chunk=chunk)


def _check_logits(op, logits):
    check_floats(op, logits=logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits must be (..., V) with V of 1 or more, got {shape(logits)}")


def _check_tokens(op, name, array, targets, weights):
    check_integers(op, "targets", targets)
    check_shape(op, "targets", targets, tuple(array.shape[:-1]), f"to match {name}")
    if weights is not None:
        check_floats(op, weights=weights)
        check_shape(op, "weights", weights, tuple(array.shape[:-1]), f"to match {name}")


def _check_options(op, ignore_index, label_smoothing, z_loss, reduction):
    if not (whole(ignore_index) and -(2**63) <= ignore_index < 2**63):
        raise ValueError(f"{op}: ignore_index must be a whole number of up to 64 bits, got {ignore_index!r}")
    check_number(op, "label_smoothing", label_smoothing, most=1)
    check_number(op, "z_loss", z_loss)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
