"""Losses over a vocabulary."""

from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_integers,
    check_scalar,
    check_shape,
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
        ignore_index: the target of tokens that do not count; a whole number, in the vocabulary or not.
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
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise ValueError(f"{op}: ignore_index must be a whole number, got {ignore_index!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be 0 to 1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss must be 0 or more, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
