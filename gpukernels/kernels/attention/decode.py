"""Attention of one new token a row over a cache: keys split between programs, partials combined in order.

    s_j = scale * q . k_j          for the keys j in use: first <= j < lengths[b]
    out = sum_j exp(s_j) v_j / sum_j exp(s_j)

    first = 0, or lengths[b] - window where there is a window and that is more

A row's keys are divided into as many equal shares, of whole blocks, as leave one program for each
multiprocessor: the number comes from the heads and the device, the size of a share from the row's own
length, which is read from device memory. So neither its neighbours nor the capacity of the cache change
a bit of a row's result, and one captured launch serves every length. Each program leaves

    acc (B, H, splits, D) float32        sum_j 2^(t_j - max) v_j over its share, t_j = s_j / ln 2
    stats (B, H, splits, 2) float32      max of t_j, and sum_j 2^(t_j - max)

and a share without keys leaves the sum 0, which says that its acc was not written. A second kernel, or
whatever kernel comes next, adds them up in the order of the shares:

    out = sum_i 2^(max_i - max) acc_i / sum_i 2^(max_i - max) sum_i

Cost, rows of n keys in use and elements of b bytes: one read of keys and values, 2 n Hkv D b a row. The
4 n H D flops are one for each of those bytes in float16, times H / Hkv: memory is the limit. GPT-2 124M
at n = 1024 reads 3.1 MB a layer. The partials are 4 H splits D bytes: 34 KB for 11 splits there.

Where every head has its keys to itself, the products are elementwise, and each of a block's BLOCK_N lanes
keeps a maximum, a sum and a result of its own: lanes meet once, after the last block. Where heads share
keys, one program serves up to 16 of them with matrix products, so that keys and values are read once.
(Not in float32, which has no such products: there a group's heads find the keys in the L2 cache.)

Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein, arXiv 1805.02867.
"""

import math

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, gpu

# By the bytes of a key, padded: keys of a block, warps. Three blocks of keys and of values in flight must fit
# the shared memory of any GPU. 64 keys of 128 bytes: probes on an H100, 2026-11-22. The others: chosen from
# the compile report, not yet measured.
_HEAD_TILES = {128: (64, 4), 256: (64, 8), 512: (32, 8), 1024: (16, 8)}
_GROUP_TILES = {256: (64, 4), 512: (32, 4)}

_GROUP = 16  # query heads that share a key-value head and a program: the rows of a matrix product
_MOST_SPLITS = 128  # what the combining kernel holds at once


@triton.jit
def _share(lengths_ptr, row, S, window, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of one split: from, to."""
    length = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), S)
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    start = first + split * share
    return start, tl.minimum(start + share, length)


@triton.jit
def _load_block(
    ptr, start, stop, stride, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """Keys or values `start` to `start + BLOCK_N`: (BLOCK_N, BLOCK_D), 0 from `stop` on. WHOLE: all are there."""
    key, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    pointers = ptr + key[:, None].to(tl.int64) * stride + d[None, :]
    if WHOLE and D == BLOCK_D:
        block = tl.load(pointers)
    elif WHOLE:
        block = tl.load(pointers, (d < D)[None, :], other=0.0)
    else:
        # What lies past a row's length may be anything, and 0 * inf is NaN.
        block = tl.load(pointers, (key < stop)[:, None] & (d < D)[None, :], other=0.0)
    return block


@triton.jit
def _attend_head(
    q, k_ptr, v_ptr, start, stop, stride_ks, stride_vs, peak, total, acc,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One more block of keys: peak and total (BLOCK_N,), acc (BLOCK_N, BLOCK_D), a row for each lane."""
    k = _load_block(k_ptr, start, stop, stride_ks, D, BLOCK_N, BLOCK_D, WHOLE).to(tl.float32)
    v = _load_block(v_ptr, start, stop, stride_vs, D, BLOCK_N, BLOCK_D, WHOLE).to(tl.float32)
    t = tl.sum(q[None, :] * k, 1)
    if not WHOLE:
        t = tl.where(start + tl.arange(0, BLOCK_N) < stop, t, float("-inf"))
    new_peak = tl.maximum(peak, t)
    # A lane that has seen nothing must not subtract -inf from -inf.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    old, weight = tl.exp2(peak - base), tl.exp2(t - base)
    return new_peak, total * old + weight, acc * old[:, None] + weight[:, None] * v


@triton.jit(do_not_specialize=["S"])
def _decode_head_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr,
    Hkv, S, window, scale,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one query head."""
    heads, split = Hkv * GROUP, tl.program_id(1)
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, stop = _share(lengths_ptr, row, S, window, split, SPLITS, BLOCK_N)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + split
    row, head = row.to(tl.int64), head.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + row * stride_qb + head * stride_qh + d, d < D, other=0.0).to(tl.float32) * scale
    k_ptr += row * stride_kb + head // GROUP * stride_kh
    v_ptr += row * stride_vb + head // GROUP * stride_vh

    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    whole = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    for block in tl.range(start, whole, BLOCK_N, num_stages=3):
        peak, total, acc = _attend_head(
            q, k_ptr, v_ptr, block, stop, stride_ks, stride_vs, peak, total, acc, D, BLOCK_N, BLOCK_D, True
        )
    if whole < stop:
        peak, total, acc = _attend_head(
            q, k_ptr, v_ptr, whole, stop, stride_ks, stride_vs, peak, total, acc, D, BLOCK_N, BLOCK_D, False
        )
    if start < stop:
        top = tl.max(peak, 0)
        weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
        tl.store(acc_ptr + place * D + d, tl.sum(acc * weight[:, None], 0), d < D)
        tl.store(stats_ptr + 2 * place, top)
        tl.store(stats_ptr + 2 * place + 1, tl.sum(total * weight, 0))
    else:
        tl.store(stats_ptr + 2 * place, float("-inf"))
        tl.store(stats_ptr + 2 * place + 1, 0.0)


@triton.jit
def _attend_group(
    q, k_ptr, v_ptr, start, stop, stride_ks, stride_vs, scale, peak, total, acc,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One more block of keys: peak and total (BLOCK_G,), acc (BLOCK_G, BLOCK_D), a row for each head."""
    k = _load_block(k_ptr, start, stop, stride_ks, D, BLOCK_N, BLOCK_D, WHOLE)
    v = _load_block(v_ptr, start, stop, stride_vs, D, BLOCK_N, BLOCK_D, WHOLE)
    t = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if not WHOLE:
        t = tl.where((start + tl.arange(0, BLOCK_N) < stop)[None, :], t, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(t, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    old, weight = tl.exp2(peak - base), tl.exp2(t - base[:, None])
    acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return new_peak, total * old + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=["S"])
def _decode_group_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr,
    Hkv, S, window, scale,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of up to BLOCK_G of the GROUP query heads that share a key-value head."""
    row, kv_head, split = tl.program_id(0) // Hkv, tl.program_id(0) % Hkv, tl.program_id(1)
    start, stop = _share(lengths_ptr, row, S, window, split, SPLITS, BLOCK_N)
    member = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    head, head_mask = kv_head * GROUP + member, member < GROUP
    place = (row.to(tl.int64) * Hkv * GROUP + head) * tl.num_programs(1) + split
    row, kv_head = row.to(tl.int64), kv_head.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = head_mask[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + row * stride_qb + head.to(tl.int64)[:, None] * stride_qh + d[None, :], mask, other=0.0)
    k_ptr += row * stride_kb + kv_head * stride_kh
    v_ptr += row * stride_vb + kv_head * stride_vh

    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    whole = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    for block in range(start, whole, BLOCK_N):
        peak, total, acc = _attend_group(
            q, k_ptr, v_ptr, block, stop, stride_ks, stride_vs, scale, peak, total, acc, D, BLOCK_N, BLOCK_D, True
        )
    if whole < stop:
        peak, total, acc = _attend_group(
            q, k_ptr, v_ptr, whole, stop, stride_ks, stride_vs, scale, peak, total, acc, D, BLOCK_N, BLOCK_D, False
        )
    if start < stop:
        tl.store(acc_ptr + place[:, None] * D + d[None, :], acc, mask)
    tl.store(stats_ptr + 2 * place, peak, head_mask)
    tl.store(stats_ptr + 2 * place + 1, total, head_mask)


@triton.jit(do_not_specialize=["splits"])
def _combine_splits_kernel(
    acc_ptr, stats_ptr, lengths_ptr, out_ptr,
    H, splits,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head: its partials, in the order of the splits, to its output."""
    place = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stats = stats_ptr + 2 * (place * splits + split)
    peak = tl.load(stats, split < splits, other=float("-inf"))
    total = tl.load(stats + 1, split < splits, other=0.0)
    written = total != 0
    top = tl.max(peak, 0)
    weight = tl.where(written, tl.exp2(peak - top), 0.0)
    mask = written[:, None] & (d < D)[None, :]
    acc = tl.load(acc_ptr + (place * splits + split)[:, None] * D + d[None, :], mask, other=0.0)
    out = tl.sum(weight[:, None] * acc, 0) / tl.sum(weight * total, 0)
    out = tl.where(tl.load(lengths_ptr + place // H) > 0, out, 0.0)
    tl.store(out_ptr + place * D + d, out.to(out_ptr.dtype.element_ty), d < D)


def decode_attention(q, k, v, lengths, window, scale):
    """(B, H, D) of q's dtype. The contract is that of `gpukernels.decode_attention`; D is 256 at most."""
    (B, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    lengths = lengths.contiguous()
    group, BLOCK_D = H // Hkv, max(16, triton.next_power_of_2(D))
    shared = group > 1 and q.dtype != torch.float32
    BLOCK_N, num_warps = _tile(_GROUP_TILES if shared else _HEAD_TILES, BLOCK_D * q.element_size())
    programs = Hkv * cdiv(group, _GROUP) if shared else H
    SPLITS = max(1, min(_MOST_SPLITS, gpu().multiprocessors // programs))
    splits = min(SPLITS, cdiv(S, BLOCK_N))  # those that a row of S keys would use

    acc = torch.empty((B, H, splits, D), dtype=torch.float32, device=q.device)
    stats = torch.empty((B, H, splits, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3])
    arguments = (q, k, v, lengths, acc, stats, Hkv, S, window, scale / math.log(2), *strides)
    tile = {"SPLITS": SPLITS, "GROUP": group, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": num_warps}
    if shared:
        _decode_group_kernel[(B * Hkv, splits, cdiv(group, _GROUP))](*arguments, BLOCK_G=_GROUP, **tile)
    else:
        _decode_head_kernel[(B * H, splits)](*arguments, **tile)
    width = min(64, BLOCK_D)
    _combine_splits_kernel[(B * H, cdiv(D, width))](
        acc, stats, lengths, out, H, splits, D=D, BLOCK_P=triton.next_power_of_2(SPLITS), BLOCK_D=width
    )
    return out


def _tile(table: dict[int, tuple[int, int]], size: int) -> tuple[int, int]:
    return next(tile for most, tile in table.items() if size <= most)
