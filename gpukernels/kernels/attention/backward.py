"""Attention, backward: dq, dk and dv from q, k, v, out, lse and dout, recomputing the scores.

With p = exp(scale q k^T - lse), which is the softmax itself,

    delta = sum over D of dout * out - dlse        (one number a query)
    ds    = p * (dout v^T - delta)
    dv    = p^T dout,   dk = scale ds^T q,   dq = scale ds k

Three kernels: delta; dk and dv by blocks of keys, over the queries that see them; dq by blocks of queries,
over the keys they see. The second and third both compute p and ds, 14 D flops a score together instead of the
10 of a single kernel that adds to dq with atomics: so the order of every sum is fixed, and the same input
gives the same bits. The programs of a key-value head go through its query heads one after another.

As in the forward pass, whole blocks that need no mask are walked without one (`blocks.py`).

Bytes: q, k, v, out, dout once or twice, dq, dk, dv once, plus 4 bytes a query for delta; the rest is L2's.

Dao et al., arXiv 2205.14135, appendix B; Dao, arXiv 2307.08691.
"""

import functools

import torch
import triton
import triton.language as tl

from gpukernels.kernels.attention import blocks
from gpukernels.kernels.attention.blocks import (
    descriptor,
    fits_descriptor,
    key_sections,
    load_rows,
    query_sections,
    store_rows,
    unit_inner_stride,
)
from gpukernels.kernels.attention.forward import LOG2_E
from gpukernels.kernels.device import cdiv
from gpukernels.kernels.tiles import attention_backward_tiles

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    T, H, stride_ob, stride_ot, stride_oh, stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, head, batch = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    o = load_rows(out_ptr, batch, row, head, stride_ob, stride_ot, stride_oh, T, D, BLOCK_M, BLOCK_D, True, False)
    do = load_rows(dout_ptr, batch, row, head, stride_dob, stride_dot, stride_doh, T, D, BLOCK_M, BLOCK_D, True, False)
    index = row + tl.arange(0, BLOCK_M)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (batch.to(tl.int64) * H + head) * T + index
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, index < T, other=0.0)
    tl.store(delta_ptr + at, delta, index < T)


@triton.jit
def _add_queries(
    dk, dv, k_tile, v_tile, first, last, q, dout, lse_ptr, delta_ptr, batch, head, offset, T, D, scale,
    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
    start, stop,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What the queries [start, stop) give to a block of keys; with MASK each key takes those of its interval."""
    # Masked walks are a step or two: to pipeline them would only cost registers.
    for row in tl.range(start, stop, BLOCK_M, num_stages=1 if MASK else None):
        q_tile = load_rows(q, batch, row, head, stride_qb, stride_qt, stride_qh, T, D, BLOCK_M, BLOCK_D, MASK, TMA)
        index = row + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + index, index < T, other=0.0)
        p = tl.exp2(tl.dot(k_tile, q_tile.T, input_precision="ieee") * scale - (lse * _LOG2_E)[None, :])
        if MASK:
            position = (offset + index)[None, :]
            p = tl.where((position >= first[:, None]) & (position < last[:, None]), p, 0.0)
        do_tile = load_rows(
            dout, batch, row, head, stride_dob, stride_dot, stride_doh, T, D, BLOCK_M, BLOCK_D, MASK, TMA
        )
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + index, index < T, other=0.0)
        ds = p * (tl.dot(v_tile, do_tile.T, input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_backward_keys_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lengths_ptr, bounds_ptr,
    T, S, H, GROUP, scale, dk_scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key-value head."""
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N  # the first keys are seen by the most queries, and start first
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch).to(tl.int32)
    if bounds_ptr is not None:
        bounds_ptr += batch.to(tl.int64) * 2 * S

    k_tile = load_rows(k, batch, n, kv_head, stride_kb, stride_ks, stride_kh, length, D, BLOCK_N, BLOCK_D, True, TMA)
    v_tile = load_rows(v, batch, n, kv_head, stride_vb, stride_vs, stride_vh, length, D, BLOCK_N, BLOCK_D, True, TMA)
    if TMA:  # behind a row's length anything may lie, and 0 * NaN is NaN
        used = (n + tl.arange(0, BLOCK_N) < length)[:, None]
        k_tile, v_tile = tl.where(used, k_tile, 0.0), tl.where(used, v_tile, 0.0)

    first, last, borders = query_sections(n, length, T, S, bounds_ptr, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, GROUP):  # a GROUP of 1 is a constant, and there is no loop
        head = kv_head * GROUP + member
        at = (batch.to(tl.int64) * H + head) * T
        for section in tl.static_range(3):
            # Without any of these every key is seen from the first query on, and the first section is empty.
            if section != 0 or CAUSAL or bounds_ptr is not None:
                dk, dv = _add_queries(
                    dk, dv, k_tile, v_tile, first, last, q, dout, lse_ptr + at, delta_ptr + at,
                    batch, head, length - T, T, D, scale,
                    stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
                    borders[section], borders[section + 1], BLOCK_M, BLOCK_D, section != 1, TMA,
                )  # fmt: skip

    dk_ptr += batch.to(tl.int64) * stride_dkb + kv_head * stride_dkh
    dv_ptr += batch.to(tl.int64) * stride_dvb + kv_head * stride_dvh
    store_rows(dk * dk_scale, dk_ptr, n, stride_dks, S, D, BLOCK_N, BLOCK_D)
    store_rows(dv, dv_ptr, n, stride_dvs, S, D, BLOCK_N, BLOCK_D)


@triton.jit
def _add_keys(
    dq, q_tile, do_tile, lse, delta, first, last, k, v, batch, kv_head, length, D, scale,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    start, stop,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What the keys [start, stop) give to a block of queries; with MASK each query takes those of its interval."""
    # As in `_add_queries`.
    for n in tl.range(start, stop, BLOCK_N, num_stages=1 if MASK else None):
        k_tile = load_rows(
            k, batch, n, kv_head, stride_kb, stride_ks, stride_kh, length, D, BLOCK_N, BLOCK_D, MASK, TMA
        )
        v_tile = load_rows(
            v, batch, n, kv_head, stride_vb, stride_vs, stride_vh, length, D, BLOCK_N, BLOCK_D, MASK, TMA
        )
        if MASK and TMA:  # behind a row's length anything may lie, and 0 * NaN is NaN
            used = (n + tl.arange(0, BLOCK_N) < length)[:, None]
            k_tile, v_tile = tl.where(used, k_tile, 0.0), tl.where(used, v_tile, 0.0)
        p = tl.exp2(tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale - lse[:, None])
        if MASK:
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((j >= first[:, None]) & (j < last[:, None]), p, 0.0)
        ds = p * (tl.dot(do_tile, v_tile.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_backward_queries_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dq_ptr, lengths_ptr, bounds_ptr,
    T, S, H, GROUP, scale, dq_scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_dqb, stride_dqt, stride_dqh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUP
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch).to(tl.int32)
    if bounds_ptr is not None:
        bounds_ptr += batch.to(tl.int64) * 2 * S

    index = row + tl.arange(0, BLOCK_M)
    first, last, borders = key_sections(row, length, T, S, bounds_ptr, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    q_tile = load_rows(q, batch, row, head, stride_qb, stride_qt, stride_qh, T, D, BLOCK_M, BLOCK_D, True, TMA)
    do_tile = load_rows(dout, batch, row, head, stride_dob, stride_dot, stride_doh, T, D, BLOCK_M, BLOCK_D, True, TMA)
    at = (batch.to(tl.int64) * H + head) * T + index
    lse = tl.load(lse_ptr + at, index < T, other=0.0) * _LOG2_E
    delta = tl.load(delta_ptr + at, index < T, other=0.0)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for section in tl.static_range(3):
        if section != 0 or WINDOW or bounds_ptr is not None:
            dq = _add_keys(
                dq, q_tile, do_tile, lse, delta, first, last, k, v, batch, kv_head, length, D, scale,
                stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                borders[section], borders[section + 1], BLOCK_N, BLOCK_D, section != 1, TMA,
            )  # fmt: skip
    dq_ptr += batch.to(tl.int64) * stride_dqb + head * stride_dqh
    store_rows(dq * dq_scale, dq_ptr, row, stride_dqt, T, D, BLOCK_M, BLOCK_D)


def attention_backward(dout, dlse, q, k, v, out, lse, lengths, bounds, scale, *, causal, window, needs, into=None):
    """dq, dk, dv, contiguous, of the inputs' dtypes.

    Args:
        dlse: the gradient of lse (B, H, T), float32, or None.
        needs: which of the three are wanted; dk and dv come together. The others come back empty.
        into: where all three are written, arrays whose last dimension is contiguous; None: made for the call.
    """
    if len(q) > blocks.MOST_ROWS:
        options = {"scale": scale, "causal": causal, "window": window, "needs": needs}
        launch = functools.partial(attention_backward, **options)
        found = blocks.in_parts(launch, dout, dlse, q, k, v, out, lse, lengths, bounds)
        return found if into is None else tuple(whole.copy_(part) for whole, part in zip(into, found, strict=True))
    needs_q, needs_kv = needs[0], needs[1] or needs[2]
    q, k, v, dout = unit_inner_stride(q, k, v, dout)
    B, T, H, D = q.shape
    S, kv_heads = k.shape[1:3]
    window = window if window < S else 0  # a wider one hides nothing, and positions plus it could pass 32 bits
    lengths = None if lengths is None else lengths.contiguous()
    if into is None:
        shapes = (q.shape if needs_q else 0, *(x.shape if needs_kv else 0 for x in (k, v)))
        into = tuple(torch.empty(each, dtype=q.dtype, device=q.device) for each in shapes)
    dq, dk, dv = into
    delta = torch.empty((B, H, T), dtype=torch.float32, device=q.device)

    # Heads wider than 128 spill hundreds of bytes when their tiles come by descriptor.
    tma = q.element_size() == 2 and D <= 128 and all(map(fits_descriptor, (q, k, v, dout)))
    keys_tile, queries_tile = attention_backward_tiles(D, q.element_size(), tma=tma)
    block_d = keys_tile.BLOCK_D
    # 32 queries a program: 16 elements a thread where heads are 64 wide. Chosen from the compile report, not yet
    # measured.
    _attention_delta_kernel[(cdiv(T, 32), H, B)](
        out, dout, None if dlse is None else dlse.contiguous(), delta,
        T, H, *out.stride()[:3], *dout.stride()[:3], D=D, BLOCK_M=32, BLOCK_D=block_d,
    )  # fmt: skip

    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    common = {"D": D, "BLOCK_D": block_d, "CAUSAL": causal, "WINDOW": window, "TMA": tma}

    def sources(tile):
        if not tma:
            return q, k, v, dout
        heights = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_N, tile.BLOCK_M)
        return [descriptor(x, height, block_d) for x, height in zip((q, k, v, dout), heights, strict=True)]

    if needs_kv:
        tile = keys_tile
        _attention_backward_keys_kernel[(cdiv(S, tile.BLOCK_N), kv_heads, B)](
            *sources(tile), lse, delta, dk, dv, lengths, bounds,
            T, S, H, H // kv_heads, scale * LOG2_E, scale, *strides, *dk.stride()[:3], *dv.stride()[:3],
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **common, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if needs_q:
        tile = queries_tile
        _attention_backward_queries_kernel[(cdiv(T, tile.BLOCK_M), H, B)](
            *sources(tile), lse, delta, dq, lengths, bounds,
            T, S, H, H // kv_heads, scale * LOG2_E, scale, *strides, *dq.stride()[:3],
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **common, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dq, dk, dv
