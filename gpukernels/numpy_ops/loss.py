"""Losses over a vocabulary: rows in blocks that stay in a core's cache."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype, row_blocks
from gpukernels.numpy_ops.matmul import linear


def cross_entropy(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    loss, divisor = _allocate(logits, targets, weights, ignore_index)
    for part, x, t, w in _blocks(logits, targets, weights):
        loss[part] = _losses(x, t, w, ignore_index, label_smoothing, z_loss)[0]
    return _reduce(loss, divisor, reduction, targets.shape)


def cross_entropy_with_gradient(
    logits, targets, *, weights=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", scale=None
):
    loss, divisor = _allocate(logits, targets, weights, ignore_index)
    dlogits = np.empty((loss.size, logits.shape[-1]), logits.dtype)
    upstream = loss.dtype.type(1 if scale is None else scale.reshape(()))
    for part, x, t, w in _blocks(logits, targets, weights):
        loss[part], lse = _losses(x, t, w, ignore_index, label_smoothing, z_loss)
        g = upstream * (1 if w is None else w) / (divisor if reduction == "mean" else 1)
        dx = np.exp(x - lse[:, None]) * (1 + 2 * z_loss * lse[:, None]) - label_smoothing / x.shape[1]
        kept = np.flatnonzero(t != ignore_index)
        dx[kept, t[kept]] -= 1 - label_smoothing
        dx = np.where((t != ignore_index)[:, None], dx * np.broadcast_to(g, t.shape)[:, None], 0)
        dlogits[part] = dx
    return _reduce(loss, divisor, reduction, targets.shape), dlogits.reshape(logits.shape)


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
    return cross_entropy(
        linear(hidden, weight),
        targets,
        weights=weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
    )


def _allocate(logits, targets, weights, ignore_index):
    """Room for the losses, and what their mean is divided by."""
    V = logits.shape[-1]
    kept = targets != ignore_index
    wrong = targets[kept & ((targets < 0) | (targets >= V))]
    if wrong.size:
        raise IndexError(f"cross_entropy: targets must be 0 to {V - 1} or ignore_index {ignore_index}, got {wrong[0]}")
    compute = compute_dtype(logits.dtype)
    divisor = np.add.reduce(kept if weights is None else weights[kept], axis=None, dtype=compute)
    return np.empty(targets.size, compute), divisor


def _blocks(logits, targets, weights):
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    targets, compute = targets.reshape(-1), compute_dtype(logits.dtype)
    weights = None if weights is None else weights.reshape(-1).astype(compute, copy=False)
    for part in row_blocks(rows):
        yield part, rows[part].astype(compute, copy=False), targets[part], None if weights is None else weights[part]


def _losses(x, targets, weights, ignore_index, label_smoothing, z_loss):
    """The weighted losses of some rows, and their lse."""
    kept = targets != ignore_index
    largest = x.max(1, initial=-np.inf)
    log_total = np.log(np.exp(x - largest[:, None]).sum(1))
    # From the largest logit, not from lse: what is near 0 keeps its digits.
    away = largest - x[np.arange(len(x)), np.where(kept, targets, 0)]
    if label_smoothing:
        away = (1 - label_smoothing) * away + label_smoothing * (largest - x.mean(1))
    lse = largest + log_total
    loss = log_total + away + z_loss * lse * lse
    return np.where(kept, loss if weights is None else loss * weights, 0), lse


def _reduce(loss, divisor, reduction, shape):
    if reduction == "none":
        return loss.reshape(shape)
    total = np.add.reduce(loss)
    return np.asarray(total / divisor if reduction == "mean" else total)
