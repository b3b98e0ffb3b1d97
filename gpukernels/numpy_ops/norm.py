"""Norms: rows in blocks that stay in a core's cache."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype, row_blocks


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    compute = compute_dtype(x.dtype)
    total = x if residual is None else np.add(x, residual, dtype=compute).astype(x.dtype, copy=False)
    rows = total.reshape(-1, x.shape[-1])
    if rows.dtype != compute:
        rows = rows.astype(compute)
    y = np.empty(rows.shape, compute)
    if len(rows) == 1:
        _normalize_row(rows[0], weight, bias, eps, y[0])
    else:
        for part in row_blocks(rows):
            _normalize_rows(rows[part], weight, bias, eps, y[part])
    y = y.reshape(x.shape)
    if compute != x.dtype:
        y = y.astype(x.dtype)
    return y if residual is None else (y, total)


def _normalize_rows(rows, weight, bias, eps, out):
    width = rows.shape[1]
    mean = np.add.reduce(rows, -1, keepdims=True)
    mean /= width
    np.subtract(rows, mean, out=out)
    deviation = np.einsum("ij,ij->i", out, out)
    deviation /= width
    deviation += eps
    np.sqrt(deviation, out=deviation)
    out /= deviation[:, None]
    out *= weight
    if bias is not None:
        out += bias


def _normalize_row(row, weight, bias, eps, out):
    """One row with half the calls: in a decode step, between two weights, each call starts cold."""
    np.subtract(row, np.add.reduce(row) / row.size, out=out)
    out /= math.sqrt(np.dot(out, out) / row.size + eps)
    out *= weight
    if bias is not None:
        out += bias
