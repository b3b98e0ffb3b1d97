"""Attention: queries that are the tail of the keys."""

import numpy as np

from gpukernels.numbers import finite, whole
from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_integers,
    check_no_gradient,
    check_shape,
    check_written,
    dtype_name,
    implementation,
    shape,
)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    lengths: Array | None = None,
    documents: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention; the queries are the tail of the keys.

    out = softmax(scale * q @ k.T + mask) @ v, by head. Query i of row b stands at position
    p = lengths[b] - T + i. It sees the keys j < lengths[b]; with `causal`, those with j <= p; with
    `window`, those with p - window < j <= p; with `documents`, those of its own document. A query at
    a negative position is padding: its output is 0. Key-value head h serves the query heads h * H/Hkv
    to (h + 1) * H/Hkv - 1.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, Hkv, D), Hkv a divisor of H.
        causal: mask the keys after the query's own position.
        window: how many keys, its own included, a query sees at most; needs `causal`.
        lengths: (B,) int32 or int64, the keys in use of each row, 0 to S; default S for all.
            NumPy checks the values; torch does not (that would wait for the device).
        documents: (B, S) int32 or int64: several sequences packed into a row. A run of equal numbers is
            one document; which numbers they are means nothing.
        scale: what the scores are multiplied by, above 0; default 1 / sqrt(D).
        return_lse: also return the logarithm of each query's sum of exp(score).

    Returns:
        (B, T, H, D), contiguous, of q's dtype; with `return_lse` also (B, H, T) float32 (float64 for
        float64 inputs), -inf for padding.

    Raises:
        TypeError: arrays of different kinds, dtypes that do not match, `lengths` or `documents` not integers.
        ValueError: shapes that do not match, a window below 1 or without `causal`, a scale that is not
            above 0.

    Numerics: scores and softmax in float32 (float64 for float64 inputs), masked before the maximum is
    taken. On CUDA the scores of heads up to 256 wide are never stored; the memory besides the results is
    4 bytes a query and head. Wider heads run plain torch.
    Source: Vaswani et al., arXiv 1706.03762; grouped heads: Ainslie et al., arXiv 2305.13245.
    """
    run = implementation("attention", {"q": q, "k": k, "v": v}, lengths=lengths, documents=documents)
    check_floats("attention", q=q, k=k, v=v)
    if q.ndim != 4:
        raise ValueError(f"attention: q must be (B, T, H, D), got {shape(q)}")
    batch, new, heads, width = q.shape
    if heads == 0 or width == 0:
        raise ValueError(f"attention: q must be (B, T, H, D) with H and D of 1 or more, got {shape(q)}")
    _check_keys("attention", q, k, v)
    window = _window("attention", window, k.shape[1], causal)
    if lengths is None:
        if causal and new > k.shape[1]:
            raise ValueError(f"attention: q has {new} positions but k only {k.shape[1]}; pass lengths for padding")
    else:
        _check_lengths("attention", lengths, batch, k.shape[1])
    _check_documents("attention", documents, batch, k.shape[1])
    _check_scale("attention", scale)
    return run.attention(
        q, k, v, causal=causal, window=window, lengths=lengths, documents=documents, scale=scale, return_lse=return_lse
    )


def packed_attention(
    qkv: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Array | None = None,
    scale: float | None = None,
) -> Array:
    """`attention` of queries, keys and values that lie together, as one product makes them.

    attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], ...); the gradient is written in one piece, where that of
    three slices is joined.

    Args:
        qkv: (B, T, 3, H, D).
        causal, window, documents, scale: as for `attention`.

    Returns:
        (B, T, H, D), contiguous, of qkv's dtype. Raises as `attention` does.
    """
    op = "packed_attention"
    run = implementation(op, {"qkv": qkv}, documents=documents)
    check_floats(op, qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"{op}: qkv must be (B, T, 3, H, D) with H and D of 1 or more, got {shape(qkv)}")
    window = _window(op, window, qkv.shape[1], causal)
    _check_documents(op, documents, *qkv.shape[:2])
    _check_scale(op, scale)
    return run.packed_attention(qkv, causal=causal, window=window, documents=documents, scale=scale)


def decode_attention(
    q: Array, k: Array, v: Array, lengths: Array, *, window: int | None = None, scale: float | None = None
) -> Array:
    """`attention` for one new token a row: what a decode step asks of its cache. No gradient.

    out = softmax(scale * q @ k.T + mask) @ v, by head. The query of row b stands at position
    lengths[b] - 1. It sees the keys j < lengths[b]; with `window`, those with j > lengths[b] - 1 - window.
    Where nothing is seen, the result is 0. Key-value head h serves the query heads h * H/Hkv to
    (h + 1) * H/Hkv - 1.

    Args:
        q: (B, H, D), D of 1 to 256.
        k, v: (B, S, Hkv, D), Hkv a divisor of H, S the capacity of the cache. A cache that is stored as
            (B, Hkv, S, D) is passed as its transposed view. What lies past a row's length is not read.
        lengths: (B,) int32 or int64, the keys in use of each row, 0 to S. NumPy checks the values;
            torch does not (that would wait for the device).
        window: how many keys, the query's own included, are seen at most.
        scale: what the scores are multiplied by, above 0; default 1 / sqrt(D).

    Returns:
        (B, H, D), contiguous, of q's dtype.

    Raises:
        TypeError: arrays of different kinds, dtypes that do not match, `lengths` not integers.
        ValueError: shapes that do not match, a window below 1, a scale that is not above 0, tensors
            that ask for a gradient.

    Numerics: as `attention`. On CUDA a row's bits depend on the row, the heads and the device alone:
    not on its neighbours, nor on the capacity.
    Cost: one read of the keys and values in use. Source: Dao et al., "Flash-Decoding", 2023.
    """
    run = implementation("decode_attention", {"q": q, "k": k, "v": v, "lengths": lengths})
    check_floats("decode_attention", q=q, k=k, v=v)
    if q.ndim != 3 or q.shape[1] == 0 or not 1 <= q.shape[2] <= 256:
        raise ValueError(f"decode_attention: q must be (B, H, D) with H of 1 or more and D of 1 to 256, got {shape(q)}")
    _check_keys("decode_attention", q, k, v)
    window = _window("decode_attention", window, k.shape[1])
    _check_lengths("decode_attention", lengths, q.shape[0], k.shape[1])
    _check_scale("decode_attention", scale)
    check_no_gradient("decode_attention", q=q, k=k, v=v)
    return run.decode_attention(q, k, v, lengths, window=window, scale=scale)


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    arrivals: Array | None = None,
) -> Array:
    """Appends new keys and values to a cache and attends to it: a model's step, for one token or a prompt. No gradient.

    keys[b, lengths[b] - N + i] = k[b, i], values the same; then causal `attention` of q, the last T of those N
    positions, over the row's lengths[b] keys. A position below 0 or beyond the cache is not written: a row of
    length 0 is not in use, and its result is 0.

    Args:
        q: (B, T, H, D), T of 1 to N.
        k, v: (B, N, Hkv, D), Hkv a divisor of H: keys and values of the new positions.
        keys, values: (B, S, Hkv, D), the cache; written. One that is stored as (B, Hkv, S, D) is passed as its
            transposed view. What lies past a row's length is not read.
        lengths: (B,) int32 or int64, the keys in use of each row, the new ones counted, 0 to S. NumPy checks the
            values; torch does not (that would wait for the device).
        window: how many keys, its own included, a query sees at most.
        scale: what the scores are multiplied by, above 0; default 1 / sqrt(D).
        arrivals: (B, H) int32, zeros before and after: where the programs of a CUDA step count themselves. None:
            made for the call, one launch more.

    Returns:
        (B, T, H, D), contiguous, of q's dtype.

    Raises:
        TypeError: arrays of different kinds, dtypes that do not match, `lengths` or `arrivals` not integers.
        ValueError: shapes that do not match, a window below 1, a scale that is not above 0, tensors that ask for
            a gradient, a cache whose last dimension is not contiguous.

    Numerics: as `attention`; with one new position, on CUDA, as `decode_attention`: a row's bits depend on the
    row, the heads and the device alone.
    Cost: one position: one read of the keys and values in use, one launch.
    """
    op = "cached_attention"
    arrays = {"q": q, "k": k, "v": v, "keys": keys, "values": values, "lengths": lengths}
    run = implementation(op, arrays, arrivals=arrivals)
    check_floats(op, q=q, k=k, v=v, keys=keys, values=values)
    if q.ndim != 4 or 0 in (q.shape[1], q.shape[2], q.shape[3]):
        raise ValueError(f"{op}: q must be (B, T, H, D) with T, H and D of 1 or more, got {shape(q)}")
    _check_keys(op, q, k, v)
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} positions but k only {k.shape[1]}")
    batch, _, kv_heads, width = k.shape
    if keys.ndim != 4 or (keys.shape[0], *keys.shape[2:]) != (batch, kv_heads, width):
        raise ValueError(f"{op}: keys must be ({batch}, S, {kv_heads}, {width}) to match k, got {shape(keys)}")
    check_shape(op, "values", values, tuple(keys.shape), "to match keys")
    for name, array in (("keys", keys), ("values", values)):
        if array.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {dtype_name(q.dtype)}, got {dtype_name(array.dtype)}")
        check_written(op, name, array)
    window = _window(op, window, keys.shape[1])
    _check_lengths(op, lengths, batch, keys.shape[1])
    _check_scale(op, scale)
    if arrivals is not None:
        check_shape(op, "arrivals", arrivals, (batch, q.shape[2]), "one counter for each row and head")
        check_written(op, "arrivals", arrivals, whole=True)
        if dtype_name(arrivals.dtype) != "int32":
            raise TypeError(f"{op}: arrivals must be int32, got {dtype_name(arrivals.dtype)}")
    check_no_gradient(op, q=q, k=k, v=v, keys=keys, values=values)
    return run.cached_attention(q, k, v, keys, values, lengths, window=window, scale=scale, arrivals=arrivals)


def _check_keys(op: str, q: Array, k: Array, v: Array) -> None:
    """k and v against q, (B, ..., H, D)."""
    batch, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"{op}: k must be ({batch}, S, Hkv, {width}) to match q, got {shape(k)}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"{op}: k's heads must divide the {heads} heads of q, got {k.shape[2]}")
    check_shape(op, "v", v, tuple(k.shape), "to match k")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {dtype_name(q.dtype)}, got {dtype_name(array.dtype)}")


def _window(op: str, window: int | None, keys: int, causal: bool = True) -> int | None:
    """The window, checked; None, which has quicker ways, for one that is as wide as all keys."""
    if window is not None and not (whole(window) and window >= 1):
        raise ValueError(f"{op}: window must be a whole number, 1 or more, got {window!r}")
    if window is not None and not causal:
        raise ValueError(f"{op}: window needs causal=True")
    return None if window is None or window >= keys else window


def _check_documents(op: str, documents: Array | None, batch: int, keys: int) -> None:
    if documents is not None:
        check_shape(op, "documents", documents, (batch, keys), "one number for each key")
        check_integers(op, "documents", documents)


def _check_lengths(op: str, lengths: Array, batch: int, keys: int) -> None:
    check_shape(op, "lengths", lengths, (batch,), "one length for each row")
    check_integers(op, "lengths", lengths)
    if isinstance(lengths, np.ndarray) and lengths.size and not 0 <= lengths.min() <= lengths.max() <= keys:
        raise ValueError(f"{op}: lengths must be 0 to {keys}, got {lengths.min()} to {lengths.max()}")


def _check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not (finite(scale) and scale > 0):
        raise ValueError(f"{op}: scale must be a number above 0, got {scale!r}")
