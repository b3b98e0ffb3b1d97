"""Attention, forward: softmax(scale q k^T + mask) v without ever storing the scores.

A program holds BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a time. With s
the scores of a block, in units of log 2 (the scale and log2 e are one factor), it keeps

    m' = max(m, max(s)),  p = 2^(s - m'),  total' = total 2^(m - m') + sum(p),  acc' = acc 2^(m - m') + p v

and ends with out = acc / total, and lse = ln(sum of exp(scores)) = (m + log2 total) ln 2, which is all that the
backward pass needs besides the inputs and out.

Blocks that every query of the program sees whole are walked without a mask; `blocks.py` says which those
are. Programs start with the last queries, which see the most keys when attention is causal.

Cost: 4 T S D flops a head (half of that when causal), on tensor cores for 16-bit inputs; bytes: q and out
once, k and v once for each block of queries, from the L2 cache but for the first. At D = 64 an exponential
stands against 256 flops: on an H100 the special-function units are as busy as the tensor cores.

Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691; Milakov and Gimelshein, arXiv 1805.02867.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from gpukernels.kernels.attention import blocks
from gpukernels.kernels.attention.blocks import (
    descriptor,
    fits_descriptor,
    key_sections,
    load_rows,
    store_rows,
    unit_inner_stride,
)
from gpukernels.kernels.device import cdiv, gpu
from gpukernels.kernels.tiles import attention_forward_tile

LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _attend(
    acc, m, total, q, first, last, k, v, batch, kv_head, length, D, scale,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    start, stop,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Takes the keys [start, stop) in; with MASK each query only those of its interval [first, last)."""
    for n in range(start, stop, BLOCK_N):
        k_tile = load_rows(
            k, batch, n, kv_head, stride_kb, stride_ks, stride_kh, length, D, BLOCK_N, BLOCK_D, MASK, TMA
        )
        s = tl.dot(q, k_tile.T, input_precision="ieee")
        if MASK:
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((j >= first[:, None]) & (j < last[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        # A query that has seen nothing yet has m = -inf, and -inf - -inf is no number.
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
        p = tl.exp2(s * scale - m_used[:, None])
        alpha = tl.exp2(m - m_used)
        total = total * alpha + tl.sum(p, 1)
        v_tile = load_rows(
            v, batch, n, kv_head, stride_vb, stride_vs, stride_vh, length, D, BLOCK_N, BLOCK_D, MASK, TMA
        )
        if MASK and TMA:  # a descriptor ends where the array does, and behind a row's length anything may lie
            v_tile = tl.where((n + tl.arange(0, BLOCK_N) < length)[:, None], v_tile, 0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return acc, m, total


# One binary for whichever row of a cache `lengths` begins at.
@triton.jit(do_not_specialize_on_alignment=["lengths_ptr"])
def _attention_forward_kernel(
    q, k, v, out_ptr, lse_ptr, lengths_ptr, bounds_ptr,
    T, S, H, GROUP, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUP
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch).to(tl.int32)
    if bounds_ptr is not None:
        bounds_ptr += batch.to(tl.int64) * 2 * S

    first, last, borders = key_sections(row, length, T, S, bounds_ptr, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    q_tile = load_rows(q, batch, row, head, stride_qb, stride_qt, stride_qh, T, D, BLOCK_M, BLOCK_D, True, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for section in tl.static_range(3):
        # Without a window or documents every query starts at key 0, and the first section is empty.
        if section != 0 or WINDOW or bounds_ptr is not None:
            acc, m, total = _attend(
                acc, m, total, q_tile, first, last, k, v, batch, kv_head, length, D, scale,
                stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                borders[section], borders[section + 1], BLOCK_N, BLOCK_D, section != 1, TMA,
            )  # fmt: skip

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    index = row + tl.arange(0, BLOCK_M)
    lse = tl.where(total == 0.0, float("-inf"), (m + tl.log2(total)) * _LN_2)
    tl.store(lse_ptr + (batch.to(tl.int64) * H + head) * T + index, lse, index < T)
    out_ptr += (batch.to(tl.int64) * T * H + head) * D
    store_rows(out, out_ptr, row, H * D, T, D, BLOCK_M, BLOCK_D)


def attention_forward(q, k, v, lengths, bounds, scale, *, causal, window):
    """out (B, T, H, D) of q's dtype, lse (B, H, T) float32.

    Args:
        lengths: (B,) integers on the device, or None; bounds: from `document_bounds`, or None.
        window: 0 for none.
    """
    if len(q) > blocks.MOST_ROWS:
        options = {"scale": scale, "causal": causal, "window": window}
        return blocks.in_parts(functools.partial(attention_forward, **options), q, k, v, lengths, bounds)
    q, k, v = unit_inner_stride(q, k, v)
    B, T, H, D = q.shape
    S, kv_heads = k.shape[1:3]
    window = window if window < S else 0  # a wider one hides nothing, and positions plus it could pass 32 bits
    lengths = None if lengths is None else lengths.contiguous()
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    tma = q.element_size() == 2 and all(map(fits_descriptor, (q, k, v)))
    tile = attention_forward_tile(D, q.element_size(), tma=tma, small=gpu().has_small_blocks)
    sources = (q, k, v)
    if tma:
        heights = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_N)
        sources = [descriptor(x, height, tile.BLOCK_D) for x, height in zip(sources, heights, strict=True)]
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    _attention_forward_kernel[(cdiv(T, tile.BLOCK_M), H, B)](
        *sources, out, lse, lengths, bounds,
        T, S, H, H // kv_heads, scale * LOG2_E, *strides,
        D=D, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D,
        CAUSAL=causal, WINDOW=window, TMA=tma, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse
