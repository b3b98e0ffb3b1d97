"""Norms: rows in blocks that stay in a core's cache."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype, row_blocks


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    return _normalize(x, weight, bias, eps, residual, center=True)


def rms_norm(x, weight, *, eps=1e-6, residual=None):
    return _normalize(x, weight, None, eps, residual, center=False)


def _normalize(x, weight, bias, eps, residual, *, center):
    compute = compute_dtype(x.dtype)
    total = x if residual is None else np.add(x, residual, dtype=compute).astype(x.dtype, copy=False)
    rows = total.reshape(-1, x.shape[-1])
    if rows.dtype != compute:
        rows = rows.astype(compute)
    y = np.empty(rows.shape, compute)
    if len(rows) == 1:
        _normalize_row(rows[0], weight, bias, eps, y[0], center)
    else:
        for part in row_blocks(rows):
            _normalize_rows(rows[part], weight, bias, eps, y[part], center)
    y = y.reshape(x.shape)
    if compute != x.dtype:
        y = y.astype(x.dtype)
    return y if residual is None else (y, total)


def _normalize_rows(rows, weight, bias, eps, out, center):
    width = rows.shape[1]
    if center:
        mean = np.add.reduce(rows, -1, keepdims=True)
        mean /= width
        rows = np.subtract(rows, mean, out=out)
    squares = np.einsum("ij,ij->i", rows, rows)
    squares /= width
    squares += eps
    np.sqrt(squares, out=squares)
    np.divide(rows, squares[:, None], out=out)
    out *= weight
    if bias is not None:
        out += bias


def _normalize_row(row, weight, bias, eps, out, center):
    """One row with half the calls: in a decode step, between two weights, each call starts cold."""
    if center:
        row = np.subtract(row, np.add.reduce(row) / row.size, out=out)
    np.divide(row, math.sqrt(np.dot(row, row) / row.size + eps), out=out)
    out *= weight
    if bias is not None:
        out += bias
