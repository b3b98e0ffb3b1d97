"""Products: BLAS's, and what stands behind them in place on blocks of rows."""

import math

import numpy as np

from gpukernels.numpy_ops import storage
from gpukernels.numpy_ops.blocks import compute_dtype, row_blocks
from gpukernels.numpy_ops.norm import layer_norm, rms_norm
from gpukernels.numpy_ops.pointwise import ACTIVATIONS


def linear(x, weight, bias=None, *, activation=None, residual=None):
    compute = compute_dtype(x.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if rows.dtype != compute:
        rows = rows.astype(compute)
    y = _product(rows, weight)
    if residual is not None:
        residual = residual.reshape(y.shape)
    for part in row_blocks(y):
        out = y[part]
        if bias is not None:
            out += bias
        if activation is not None:
            ACTIVATIONS[activation](out)
        if residual is not None:
            out += residual[part]
    y = y.reshape(*x.shape[:-1], len(weight))
    return y if compute == x.dtype else y.astype(x.dtype)


def norm_linear(
    x, norm_weight, norm_bias, weight, bias=None, *, norm="layer", eps=1e-5, activation=None, with_x=False
):  # fmt: skip
    h = rms_norm(x, norm_weight, eps=eps) if norm == "rms" else layer_norm(x, norm_weight, norm_bias, eps=eps)
    y = linear(h, weight, bias, activation=activation)
    return (y, x) if with_x else y


def matmul(a, b):
    compute = compute_dtype(a.dtype)
    return np.matmul(a.astype(compute, copy=False), b.astype(compute, copy=False)).astype(a.dtype, copy=False)


def _product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """rows (M, K) @ weight.T, (N, K) in rows' dtype or narrower, as a new (M, N) array."""
    if weight.dtype == rows.dtype:
        return np.dot(weight, rows[0])[None] if len(rows) == 1 else np.matmul(rows, weight.T)
    if weight.dtype == np.float16 and rows.dtype == np.float32:
        return storage.product(rows, weight)
    return np.matmul(rows, weight.T.astype(rows.dtype))
