"""Attention by blocks of queries, with the scores in one scratch array."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype

# Queries handled at a time, and scores: a causal block skips the keys after it, so smaller blocks
# save work; larger ones make better products. 256 KiB of scores stay in the second-level cache.
_QUERIES = 128
_SCORES = 65536


def attention(q, k, v, *, causal=True, window=None, lengths=None, scale=None):
    batch, new, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    scale = 1 / math.sqrt(width) if scale is None else scale
    compute = compute_dtype(q.dtype)
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


def decode_attention(q, k, v, lengths, *, window=None, scale=None):
    return attention(q[:, None], k, v, window=window, lengths=lengths, scale=scale)[:, 0]


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
