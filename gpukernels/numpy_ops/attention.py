"""Attention by blocks of queries, with the scores in one scratch array."""

import itertools
import math
from collections.abc import Iterable

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype

# Queries handled at a time, and scores: a causal block skips the keys after it, so smaller blocks
# save work; larger ones make better products. 256 KiB of scores stay in the second-level cache.
_QUERIES = 128
_SCORES = 65536


def attention(
    q, k, v, *, causal=True, window=None, lengths=None, documents=None, scale=None, return_lse=False
):  # fmt: skip
    batch, new, heads, width = q.shape
    keys = k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    compute = compute_dtype(q.dtype)
    scaled = np.multiply(q, scale, dtype=compute)
    k, v = k.astype(compute, copy=False), v.astype(compute, copy=False)
    out = np.zeros(q.shape, compute)
    lse = np.full((batch, heads, new), -np.inf, np.promote_types(compute, np.float32)) if return_lse else None
    # Scores have one place: an array of this size that comes and goes is mapped and cleared every time.
    group = heads // k.shape[2]
    scratch = np.empty(max(_SCORES, group * min(new, _QUERIES) * keys), compute) if new > 1 else None

    for row in range(batch):
        length = keys if lengths is None else int(lengths[row])
        offset = length - new  # the position of query 0
        for start, stop in [(0, length)] if documents is None else _documents(documents[row], length):
            # The queries in a document are the tail of its keys, as those of a row are of the row's.
            own = slice(max(offset, start) - offset, stop - offset)
            if own.start < own.stop:
                arrays = scaled[row, own], k[row, start:stop], v[row, start:stop], out[row, own]
                row_lse = None if lse is None else lse[row, :, own]
                hiding = None if window is None or window >= stop - start else window
                if own.stop - own.start == 1:
                    _attend_one(*arrays, row_lse, hiding)
                else:
                    _attend(*arrays, row_lse, causal, hiding, scratch)
    out = out.astype(q.dtype, copy=False)
    return (out, lse) if return_lse else out


def packed_attention(qkv, *, causal=True, window=None, documents=None, scale=None):
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return attention(q, k, v, causal=causal, window=window, documents=documents, scale=scale)


def decode_attention(q, k, v, lengths, *, window=None, scale=None):
    return attention(q[:, None], k, v, window=window, lengths=lengths, scale=scale)[:, 0]


def cached_attention(q, k, v, keys, values, lengths, *, window=None, scale=None, arrivals=None):
    new = k.shape[1]
    for row, length in enumerate(lengths.tolist()):
        start, padding = max(0, length - new), max(0, new - length)
        keys[row, start:length] = k[row, padding:]
        values[row, start:length] = v[row, padding:]
    return attention(q, keys, values, window=window, lengths=lengths, scale=scale)


def _documents(documents: np.ndarray, length: int) -> Iterable[tuple[int, int]]:
    """Where each run of equal numbers starts and stops."""
    borders = np.flatnonzero(np.diff(documents[:length])) + 1
    return itertools.pairwise([0, *borders.tolist(), length])


def _attend_one(q, k, v, out, lse, window):
    """The last query (1, H, D) of keys and values (n, Hkv, D), a decode step's share: it sees them all."""
    kv_heads, width = k.shape[1:]
    if window is not None:
        k, v = k[-window:], v[-window:]
    scores = np.matmul(q.reshape(kv_heads, -1, width), k.transpose(1, 2, 0))
    largest = np.maximum.reduce(scores, -1, keepdims=True)
    scores -= largest
    np.exp(scores, out=scores)
    result = out.reshape(kv_heads, -1, width)
    np.matmul(scores, v.swapaxes(0, 1), out=result)
    total = np.add.reduce(scores, -1, keepdims=True)
    result /= total
    if lse is not None:
        lse[...] = (largest + np.log(total)).reshape(lse.shape)


def _attend(q, k, v, out, lse, causal, window, scratch):
    """Queries (T, H, D), the tail of keys and values (n, Hkv, D), in blocks."""
    new, heads, width = q.shape
    keys, kv_heads = k.shape[:2]
    group = heads // kv_heads
    # By key-value head: queries and output (Hkv, group, T, D), keys (Hkv, D, n), values (Hkv, n, D).
    q, out = (array.reshape(new, kv_heads, group, width).transpose(1, 2, 0, 3) for array in (q, out))
    k, v = k.transpose(1, 2, 0), v.transpose(1, 0, 2)
    lse = None if lse is None else lse.reshape(kv_heads, group, new)
    offset = keys - new
    for start in range(0, new, _QUERIES):
        stop = min(new, start + _QUERIES)
        first = 0 if window is None else max(0, offset + start - window + 1)
        last = offset + stop if causal else keys
        hidden = _hidden(offset + start, stop - start, first, last, causal, window)
        step = max(1, _SCORES // (group * (stop - start) * (last - first)))
        for head in range(0, kv_heads, step):
            part = slice(head, head + step)
            queries = q[part, :, start:stop]
            some, shape = len(queries), queries.shape
            scores = scratch[: math.prod(shape[:3]) * (last - first)].reshape(some, -1, last - first)
            np.matmul(queries.reshape(some, -1, width), k[part, :, first:last], out=scores)
            if hidden is not None:
                by_query = scores.reshape(*shape[:3], last - first)[..., -hidden.shape[1] :]
                np.copyto(by_query, -np.inf, where=hidden)
            largest = np.maximum.reduce(scores, -1, keepdims=True)
            scores -= largest
            np.exp(scores, out=scores)
            result = np.matmul(scores, v[part, first:last])
            total = np.einsum("hqk->hq", scores)[..., None]
            result /= total
            out[part, :, start:stop] = result.reshape(shape)
            if lse is not None:
                lse[part, :, start:stop] = (largest + np.log(total)).reshape(shape[:3])


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
