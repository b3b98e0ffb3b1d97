"""Every op on `np.ndarray`: the CPU runtime. Imports NumPy only.

`gpukernels.ops` has the contracts and has checked the arguments. What counts here: a decode step is
matrix-vector products at the speed of memory, so nothing else may touch a weight-sized array; in
prefill the products are BLAS's, so what stands between them works in place, on blocks of rows that
stay in a core's cache.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np

from gpukernels.cast import widen_float16

# Elements that an elementwise pass handles at a time: 256 KiB of float32, and as much scratch,
# fit the 1 MiB second-level cache of a current core.
_BLOCK = 65536

# Queries handled at a time, and scores: a causal block skips the keys after it, so smaller blocks
# save work; larger ones make better products. 256 KiB of scores stay in the second-level cache.
_QUERIES = 128
_SCORES = 65536

# Elements of float16 weight widened at a time.
_WIDEN = 262144


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    compute = _compute_dtype(x.dtype)
    total = x if residual is None else np.add(x, residual, dtype=compute).astype(x.dtype, copy=False)
    rows = total.reshape(-1, x.shape[-1])
    if rows.dtype != compute:
        rows = rows.astype(compute)
    y = np.empty(rows.shape, compute)
    if len(rows) == 1:
        _normalize_row(rows[0], weight, bias, eps, y[0])
    else:
        for part in _row_blocks(rows):
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


def linear(x, weight, bias=None, *, activation=None, residual=None):
    compute = _compute_dtype(x.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if rows.dtype != compute:
        rows = rows.astype(compute)
    y = _product(rows, weight)
    if residual is not None:
        residual = residual.reshape(y.shape)
    for part in _row_blocks(y):
        out = y[part]
        if bias is not None:
            out += bias
        if activation is not None:
            _ACTIVATIONS[activation](out)
        if residual is not None:
            out += residual[part]
    y = y.reshape(*x.shape[:-1], len(weight))
    return y if compute == x.dtype else y.astype(x.dtype)


def norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    return linear(layer_norm(x, norm_weight, norm_bias, eps=eps), weight, bias, activation=activation)


def matmul(a, b):
    compute = _compute_dtype(a.dtype)
    return np.matmul(a.astype(compute, copy=False), b.astype(compute, copy=False)).astype(a.dtype, copy=False)


def attention(q, k, v, *, causal=True, window=None, lengths=None, scale=None):
    batch, new, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    scale = 1 / math.sqrt(width) if scale is None else scale
    compute = _compute_dtype(q.dtype)
    scaled = np.multiply(q, scale, dtype=compute)
    k, v = k.astype(compute, copy=False), v.astype(compute, copy=False)
    out = np.zeros(q.shape, compute)
    if new == 1:
        for row in range(batch):
            length = keys if lengths is None else int(lengths[row])
            if length:
                seen = slice(0 if window is None else max(0, length - window), length)
                _attend_one(scaled[row, 0], k[row, seen], v[row, seen], out[row, 0])
        return out.astype(q.dtype, copy=False)
    # Scores have one place: an array of this size that comes and goes is mapped and cleared every time.
    scratch = np.empty(max(_SCORES, group * min(new, _QUERIES) * keys), compute)

    for row in range(batch):
        length = keys if lengths is None else int(lengths[row])
        # By key-value head: queries and output (Hkv, group, T, D), keys (Hkv, D, S), values (Hkv, S, D).
        q_row, out_row = (
            array[row].reshape(new, kv_heads, group, width).transpose(1, 2, 0, 3) for array in (scaled, out)
        )
        k_row, v_row = k[row].transpose(1, 2, 0), v[row].transpose(1, 0, 2)
        offset = length - new  # the position of query 0
        for start in range(max(0, -offset), new, _QUERIES):
            stop = min(new, start + _QUERIES)
            first = 0 if window is None else max(0, offset + start - window + 1)
            last = offset + stop if causal else length
            hidden = _hidden(offset + start, stop - start, first, last, causal, window)
            step = max(1, _SCORES // (group * (stop - start) * (last - first)))
            for head in range(0, kv_heads, step):
                part = slice(head, head + step)
                queries = q_row[part, :, start:stop]
                some, shape = len(queries), queries.shape
                scores = scratch[: math.prod(shape[:3]) * (last - first)].reshape(some, -1, last - first)
                np.matmul(queries.reshape(some, -1, width), k_row[part, :, first:last], out=scores)
                if hidden is not None:
                    by_query = scores.reshape(*shape[:3], last - first)[..., -hidden.shape[1] :]
                    np.copyto(by_query, -np.inf, where=hidden)
                scores -= np.maximum.reduce(scores, -1, keepdims=True)
                np.exp(scores, out=scores)
                result = np.matmul(scores, v_row[part, first:last])
                result /= np.einsum("hqk->hq", scores)[..., None]
                out_row[part, :, start:stop] = result.reshape(shape)
    return out.astype(q.dtype, copy=False)


def _attend_one(q, k, v, out):
    """One query (H, D) over keys and values (n, Hkv, D) that it all sees: a decode step's share."""
    kv_heads, width = k.shape[1:]
    scores = np.matmul(q.reshape(kv_heads, -1, width), k.transpose(1, 2, 0))
    scores -= np.maximum.reduce(scores, -1, keepdims=True)
    np.exp(scores, out=scores)
    result = out.reshape(kv_heads, -1, width)
    np.matmul(scores, v.swapaxes(0, 1), out=result)
    result /= np.add.reduce(scores, -1, keepdims=True)


def _hidden(position: int, queries: int, first: int, last: int, causal: bool, window: int | None):
    """Which of the last keys before `last` a block of queries must not see: (queries, n), or None.

    Without a window only the block's own positions can be hidden from one another.
    """
    if not causal or (queries == 1 and window is None):
        return None
    query = np.arange(position, position + queries)[:, None]
    if window is None:
        return query < np.arange(position, last)
    key = np.arange(first, last)
    return (query < key) | (query - window >= key)


def embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    dtype = weight.dtype if dtype is None else np.dtype(dtype)
    _check_index("ids", ids, weight)
    if positions is None:
        return weight[ids].astype(dtype, copy=False)
    _check_index("positions", positions, position_weight)
    y = weight[ids].astype(dtype, copy=False)
    y += position_weight[positions]
    return y


def _check_index(name: str, index: np.ndarray, table: np.ndarray) -> None:
    # A negative index would quietly count from the end.
    if index.size and not 0 <= index.min() <= index.max() < len(table):
        raise IndexError(f"embedding: {name} must be 0 to {len(table) - 1}, got {index.min()} to {index.max()}")


@functools.cache
def _compute_dtype(dtype: np.dtype) -> np.dtype:
    return np.promote_types(dtype, np.float32)


def _row_blocks(rows: np.ndarray) -> Iterable[slice]:
    """Slices of whole rows, about `_BLOCK` elements each."""
    if rows.size <= _BLOCK:
        return (slice(None),)
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """rows (M, K) @ weight.T, (N, K) in rows' dtype or narrower, as a new (M, N) array."""
    if weight.dtype == rows.dtype:
        return np.dot(weight, rows[0])[None] if len(rows) == 1 else np.matmul(rows, weight.T)
    if weight.dtype != np.float16 or rows.dtype != np.float32:
        return np.matmul(rows, weight.T.astype(rows.dtype))
    # float16 storage: widen a block that fits the cache, use it, forget it. The blocks follow the
    # storage: rows of an (out, in) weight give columns of y; rows of (in, out) storage add up.
    by_output = weight.flags.c_contiguous
    storage = weight if by_output else weight.T
    y = np.zeros((len(rows), len(weight)), np.float32)
    step = max(1, _WIDEN // max(1, storage.shape[1]))
    scratch = np.empty((min(step, len(storage)), storage.shape[1]), np.float32)
    for start in range(0, len(storage), step):
        part = slice(start, start + step)
        block = scratch[: len(storage[part])]
        widen_float16(np.ascontiguousarray(storage[part]), block)
        if by_output:
            y[:, part] = np.matmul(rows, block.T)
        else:
            y += np.matmul(rows[:, part], block)
    return y


# Activations, in place. Overflow is meant to saturate: tanh(inf) is 1, x / inf is 0.


def _gelu_new(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, arXiv 1606.08415."""
    root = math.sqrt(2 / math.pi)
    with np.errstate(over="ignore"):
        inner = x * x
        inner *= 0.044715 * root
        inner += root
        inner *= x
    np.tanh(inner, out=inner)
    inner += 1
    inner *= 0.5
    x *= inner


def _gelu(x):
    half = _erf(x * math.sqrt(0.5))
    half += 1
    half *= 0.5
    x *= half


def _relu(x):
    np.maximum(x, 0, out=x)


def _silu(x):
    with np.errstate(over="ignore"):
        denominator = np.exp(-x)
    denominator += 1
    x /= denominator


def _tanh(x):
    np.tanh(x, out=x)


_ACTIVATIONS = {"gelu": _gelu, "gelu_new": _gelu_new, "relu": _relu, "silu": _silu, "tanh": _tanh}

# erf(x) = x P(x^2) / Q(x^2) for |x| up to the bound, where float32's erf has become 1: the rational
# approximation of XLA's ErfImpl32 (openxla/xla, math.cc). Highest power first.
_ERF_BOUND = 3.7439211627767994
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7,
    2.3547966471313185e-5,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)
_erf_exact = np.frompyfunc(math.erf, 1, 1)


def _erf(x):
    """erf, as a new array: within 4e-7 of the true value in float32; float64 asks the C library."""
    if x.dtype == np.float64:
        return np.asarray(_erf_exact(x), np.float64)
    x = np.clip(x, -_ERF_BOUND, _ERF_BOUND)
    square = x * x
    x *= _horner(_ERF_P, square)
    x /= _horner(_ERF_Q, square)
    return x


def _horner(coefficients, x):
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += coefficient
    return y
