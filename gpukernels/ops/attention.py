"""Attention: queries that are the tail of the keys."""

import math

import numpy as np

from gpukernels.ops.checks import Array, check_floats, check_integers, check_shape, dtype_name, implementation, shape


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
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"attention: k must be ({batch}, S, Hkv, {width}) to match q, got {shape(k)}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"attention: k's heads must divide the {heads} heads of q, got {k.shape[2]}")
    check_shape("attention", "v", v, tuple(k.shape), "to match k")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} must have q's dtype {dtype_name(q.dtype)}, got {dtype_name(array.dtype)}"
            )
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"attention: window must be a whole number, 1 or more, got {window!r}")
    if window is not None and not causal:
        raise ValueError("attention: window needs causal=True")
    if lengths is None:
        if causal and new > k.shape[1]:
            raise ValueError(f"attention: q has {new} positions but k only {k.shape[1]}; pass lengths for padding")
    else:
        check_shape("attention", "lengths", lengths, (batch,), "one length for each row")
        check_integers("attention", "lengths", lengths)
        if isinstance(lengths, np.ndarray) and lengths.size and not 0 <= lengths.min() <= lengths.max() <= k.shape[1]:
            raise ValueError(f"attention: lengths must be 0 to {k.shape[1]}, got {lengths.min()} to {lengths.max()}")
    if documents is not None:
        check_shape("attention", "documents", documents, (batch, k.shape[1]), "one number for each key")
        check_integers("attention", "documents", documents)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale must be a number above 0, got {scale!r}")
    return run.attention(
        q, k, v, causal=causal, window=window, lengths=lengths, documents=documents, scale=scale, return_lse=return_lse
    )
