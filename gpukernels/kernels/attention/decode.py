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

and the last one of a head to do so, whichever it is, adds them up in the order of the shares:

    out = sum_i 2^(max_i - max) acc_i / sum_i 2^(max_i - max) sum_i

A counter of arrivals says who is the last, who sets it back to 0. Programs whose share would be empty do
nothing.

With new keys and values (B, Hkv, D), those of position lengths[b] - 1, the program that has the last share
takes them from there and writes them to the cache, which the others do not read at that place.

Cost, rows of n keys in use and elements of b bytes: one read of keys and values, 2 n Hkv D b a row. The
4 n H D flops are one for each of those bytes in float16, times H / Hkv: memory is the limit. GPT-2 124M
at n = 1024 reads 3.1 MB a layer. The partials are 4 H splits D bytes: 34 KB for 11 splits there.

Where every head has its keys to itself, the products are elementwise, and each of a block's BLOCK_N lanes
keeps a maximum, a sum and a result of its own: lanes meet once, after the last block. Where heads share
keys, one program serves up to 16 of them with matrix products, so that keys and values are read once.
(Not in float32, which has no such products: there a group's heads find the keys in the L2 cache.)

DEPENDENT (see `gpukernels.launches`): the length and the first block of old keys and values are loaded before the
wait: the sampling kernel of the last step and this layer's attention then wrote them, long before the norm in front
of this kernel, and what may still run comes behind that. Queries, the new key and value, which the product in front
writes, and all stores stand behind the wait; programs without a share end at once, but each row has one that waits.
The next kernel may start at once.

Dao et al., "Flash-Decoding for long-context inference", 2023; Milakov and Gimelshein, arXiv 1805.02867.
"""

import math

import torch
import triton
import triton.language as tl

from gpukernels.kernels.attention.shares import arrives_last, combine, load_block, rescale, share_of, take_new
from gpukernels.kernels.device import cdiv, dependent_launch, gpu

# By the bytes of a key, padded: keys of a block, warps. Three blocks of keys and of values in flight must fit
# the shared memory of any GPU. 64 keys of 128 bytes: probes on an H100, 2026-11-22. The others: chosen from
# the compile report, not yet measured.
_HEAD_TILES = {128: (64, 4), 256: (64, 8), 512: (32, 8), 1024: (16, 8)}
_GROUP_TILES = {256: (64, 4), 512: (32, 4)}
# With 99 KiB for a block: two of them on a multiprocessor. Chosen from the compile report, not yet measured.
_GROUP_TILES_SMALL = {256: (32, 4), 512: (16, 4)}

_GROUP = 16  # query heads that share a key-value head and a program: the rows of a matrix product
_MOST_SPLITS = 128  # what the last program holds at once, 64 wide


@triton.jit
def _attend_head(q, k, v, start, stop, peak, total, acc, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """One more block of keys: peak and total (BLOCK_N,), acc (BLOCK_N, BLOCK_D), a row for each lane."""
    t = tl.sum(q[None, :] * k.to(tl.float32), 1)
    if not WHOLE:
        t = tl.where(start + tl.arange(0, BLOCK_N) < stop, t, float("-inf"))
    new_peak = tl.maximum(peak, t)
    old, base = rescale(peak, new_peak)
    weight = tl.exp2(t - base)
    return new_peak, total * old + weight, acc * old[:, None] + weight[:, None] * v.to(tl.float32)


@triton.jit
def _attend_group(q, k, v, start, stop, scale, peak, total, acc, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """One more block of keys: peak and total (BLOCK_G,), acc (BLOCK_G, BLOCK_D), a row for each head."""
    t = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if not WHOLE:
        t = tl.where((start + tl.arange(0, BLOCK_N) < stop)[None, :], t, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(t, 1))
    old, base = rescale(peak, new_peak)
    weight = tl.exp2(t - base[:, None])
    acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return new_peak, total * old + tl.sum(weight, 1), acc


@triton.jit
def find_split(
    new_k_ptr, k_ptr, v_ptr, lengths_ptr, place, split, Hkv, S, window,
    stride_kb, stride_kh, stride_vb, stride_vh,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a split of one query head is of; `place` counts the heads of all rows.

    Pointers to its keys and values, the length of its row, how many splits that uses, and its keys: the first one,
    the end of those in the cache, and whether the new one behind them is its too.
    """
    heads = Hkv * GROUP
    row, kv_head = (place // heads).to(tl.int64), (place % heads // GROUP).to(tl.int64)
    length, used, start, stop = share_of(lengths_ptr, row, S, window, split, SPLITS, BLOCK_N)
    old = stop
    takes_new = False
    if new_k_ptr is not None:
        old = tl.minimum(stop, length - 1)
        takes_new = (split == used - 1) & (length > 0)
    k_ptr += row * stride_kb + kv_head * stride_kh
    return k_ptr, v_ptr + row * stride_vb + kv_head * stride_vh, length, used, start, old, takes_new


@triton.jit
def attend_split(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr, k, v,
    place, split, splits, length, used, start, old, takes_new, Hkv, scale,
    stride_qb, stride_qh, stride_new_kb, stride_new_kh, stride_new_vb, stride_new_vh, stride_ks, stride_vs,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split of one query head, which `find_split` found and which is one of those used.

    k, v: the block of keys from `start` on, and of values, where they are loaded already; or None.
    """
    heads = Hkv * GROUP
    row, head, place = (place // heads).to(tl.int64), (place % heads).to(tl.int64), place.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q = tl.load(q_ptr + row * stride_qb + head * stride_qh + d, d < D, other=0.0).to(tl.float32) * scale
    block = start
    if k is not None:
        peak, total, acc = _attend_head(q, k, v, start, old, peak, total, acc, BLOCK_N, False)
        block = start + BLOCK_N
    whole = block + tl.maximum(old - block, 0) // BLOCK_N * BLOCK_N
    for n in tl.range(block, whole, BLOCK_N, num_stages=3):
        next_k = load_block(k_ptr, n, old, stride_ks, D, BLOCK_N, BLOCK_D, True)
        next_v = load_block(v_ptr, n, old, stride_vs, D, BLOCK_N, BLOCK_D, True)
        peak, total, acc = _attend_head(q, next_k, next_v, n, old, peak, total, acc, BLOCK_N, True)
    if whole < old:
        last_k = load_block(k_ptr, whole, old, stride_ks, D, BLOCK_N, BLOCK_D, False)
        last_v = load_block(v_ptr, whole, old, stride_vs, D, BLOCK_N, BLOCK_D, False)
        peak, total, acc = _attend_head(q, last_k, last_v, whole, old, peak, total, acc, BLOCK_N, False)

    top = tl.max(peak, 0)
    weight, _base = rescale(peak, top)
    # As a group of one head.
    one_peak = tl.zeros((1,), tl.float32) + top
    one_total = tl.zeros((1,), tl.float32) + tl.sum(total * weight, 0)
    one_acc = tl.sum(acc * weight[:, None], 0)[None, :]
    if new_k_ptr is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if takes_new:
            newest, kv_head = (length - 1).to(tl.int64), head // GROUP
            one_peak, one_total, one_acc = take_new(
                q[None, :],
                new_k_ptr + row * stride_new_kb + kv_head * stride_new_kh,
                new_v_ptr + row * stride_new_vb + kv_head * stride_new_vh,
                k_ptr + newest * stride_ks, v_ptr + newest * stride_vs,
                one_peak, one_total, one_acc, D, BLOCK_D,
            )  # fmt: skip
    if used == 1:
        out = tl.where(length > 0, one_acc / one_total[:, None], 0.0)
        tl.store(out_ptr + place * D + d[None, :], out.to(out_ptr.dtype.element_ty), (d < D)[None, :])
    else:
        acc_ptr += place * splits * D
        stats_ptr += place * splits * 2
        one = tl.arange(0, 1)
        tl.store(acc_ptr + split * D + d[None, :], one_acc, (d < D)[None, :])
        tl.store(stats_ptr + 2 * split + one, one_peak)
        tl.store(stats_ptr + 2 * split + 1 + one, one_total)
        if arrives_last(arrivals_ptr + place, used):
            combine(acc_ptr, stats_ptr, out_ptr + place * D, used, D, BLOCK_D, BLOCK_P)


@triton.jit(do_not_specialize=["S"])
def _decode_head_kernel(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr,
    Hkv, S, window, scale,
    stride_qb, stride_qh, stride_new_kb, stride_new_kh, stride_new_vb, stride_new_vh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of one query head."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    place, split = tl.program_id(0), tl.program_id(1)
    k_ptr, v_ptr, length, used, start, old, takes_new = find_split(
        new_k_ptr, k_ptr, v_ptr, lengths_ptr, place, split, Hkv, S, window,
        stride_kb, stride_kh, stride_vb, stride_vh, SPLITS, GROUP, BLOCK_N,
    )  # fmt: skip
    if split < used:
        k = None
        v = None
        if DEPENDENT:
            k = load_block(k_ptr, start, old, stride_ks, D, BLOCK_N, BLOCK_D, False)
            v = load_block(v_ptr, start, old, stride_vs, D, BLOCK_N, BLOCK_D, False)
            tl.extra.cuda.gdc_wait()
        attend_split(
            q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr, k, v,
            place, split, tl.num_programs(1), length, used, start, old, takes_new, Hkv, scale,
            stride_qb, stride_qh, stride_new_kb, stride_new_kh, stride_new_vb, stride_new_vh, stride_ks, stride_vs,
            GROUP, D, BLOCK_N, BLOCK_D, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _decode_group_kernel(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr,
    Hkv, S, window, scale,
    stride_qb, stride_qh, stride_new_kb, stride_new_kh, stride_new_vb, stride_new_vh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of up to BLOCK_G of the GROUP query heads that share a key-value head."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    row, kv_head = (tl.program_id(0) // Hkv).to(tl.int64), (tl.program_id(0) % Hkv).to(tl.int64)
    split = tl.program_id(1)
    length, used, start, stop = share_of(lengths_ptr, row, S, window, split, SPLITS, BLOCK_N)
    if split < used:
        member = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
        head, head_mask = kv_head * GROUP + member, member < GROUP
        place = row * Hkv * GROUP + head
        d = tl.arange(0, BLOCK_D)
        mask = head_mask[:, None] & (d < D)[None, :]
        k_ptr += row * stride_kb + kv_head * stride_kh
        v_ptr += row * stride_vb + kv_head * stride_vh
        old = stop
        newest = length - 1
        if new_k_ptr is not None:
            old = tl.minimum(stop, newest)
        peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        q_pointers = q_ptr + row * stride_qb + head[:, None] * stride_qh + d[None, :]
        block = start
        if DEPENDENT:
            k = load_block(k_ptr, start, old, stride_ks, D, BLOCK_N, BLOCK_D, False)
            v = load_block(v_ptr, start, old, stride_vs, D, BLOCK_N, BLOCK_D, False)
            tl.extra.cuda.gdc_wait()
            q = tl.load(q_pointers, mask, other=0.0)
            peak, total, acc = _attend_group(q, k, v, start, old, scale, peak, total, acc, BLOCK_N, False)
            block = start + BLOCK_N
        else:
            q = tl.load(q_pointers, mask, other=0.0)
        whole = block + tl.maximum(old - block, 0) // BLOCK_N * BLOCK_N
        for n in range(block, whole, BLOCK_N):
            k = load_block(k_ptr, n, old, stride_ks, D, BLOCK_N, BLOCK_D, True)
            v = load_block(v_ptr, n, old, stride_vs, D, BLOCK_N, BLOCK_D, True)
            peak, total, acc = _attend_group(q, k, v, n, old, scale, peak, total, acc, BLOCK_N, True)
        if whole < old:
            k = load_block(k_ptr, whole, old, stride_ks, D, BLOCK_N, BLOCK_D, False)
            v = load_block(v_ptr, whole, old, stride_vs, D, BLOCK_N, BLOCK_D, False)
            peak, total, acc = _attend_group(q, k, v, whole, old, scale, peak, total, acc, BLOCK_N, False)
        if new_k_ptr is not None:  # noqa: SIM102 (decided when the kernel is compiled)
            if (split == used - 1) & (length > 0):
                peak, total, acc = take_new(
                    q.to(tl.float32) * scale,
                    new_k_ptr + row * stride_new_kb + kv_head * stride_new_kh,
                    new_v_ptr + row * stride_new_vb + kv_head * stride_new_vh,
                    k_ptr + newest.to(tl.int64) * stride_ks, v_ptr + newest.to(tl.int64) * stride_vs,
                    peak, total, acc, D, BLOCK_D,
                )  # fmt: skip
        if used == 1:
            out = tl.where(length > 0, acc / total[:, None], 0.0)
            tl.store(out_ptr + place[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask)
        else:
            splits = tl.num_programs(1)
            partial = place * splits + split
            tl.store(acc_ptr + partial[:, None] * D + d[None, :], acc, mask)
            tl.store(stats_ptr + 2 * partial, peak, head_mask)
            tl.store(stats_ptr + 2 * partial + 1, total, head_mask)
            first = (row * Hkv + kv_head) * GROUP + tl.program_id(2) * BLOCK_G
            if arrives_last(arrivals_ptr + first, used):
                for each in range(0, tl.minimum(BLOCK_G, GROUP - tl.program_id(2) * BLOCK_G)):
                    at = first + each
                    partials = acc_ptr + at * splits * D
                    combine(partials, stats_ptr + at * splits * 2, out_ptr + at * D, used, D, BLOCK_D, BLOCK_P)


def decode_attention(q, k, v, lengths, window, scale, *, new_k=None, new_v=None, arrivals=None):
    """(B, H, D) of q's dtype. The contract is that of `gpukernels.decode_attention`; D is 256 at most.

    Args:
        new_k, new_v: (B, Hkv, D), written to k and v at lengths[b] - 1 first, as it were; or None.
        arrivals: (B, H) int32 zeros, which are zeros again afterwards; None: made here.
    """
    (B, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    given = (k, v, lengths)
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    lengths = lengths.contiguous()
    group, BLOCK_D = H // Hkv, max(16, triton.next_power_of_2(D))
    shared = group > 1 and q.dtype != torch.float32
    group_tiles = _GROUP_TILES_SMALL if gpu().has_small_blocks else _GROUP_TILES
    if shared:
        BLOCK_N, num_warps = _tile(group_tiles, BLOCK_D * q.element_size())
    else:
        BLOCK_N, num_warps = head_tile(D, q.element_size())
    SPLITS = most_splits(Hkv * cdiv(group, _GROUP) if shared else H)
    splits = max(1, min(SPLITS, cdiv(S, BLOCK_N)))  # those that a row of S keys would use

    acc = torch.empty((B, H, splits, D), dtype=torch.float32, device=q.device)
    stats = torch.empty((B, H, splits, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    if arrivals is None:
        arrivals = torch.zeros((B, H), dtype=torch.int32, device=q.device)
    new_strides = (0, 0, 0, 0)
    if new_k is not None:
        new_k, new_v = (each if each.stride(-1) == 1 else each.contiguous() for each in (new_k, new_v))
        new_strides = (*new_k.stride()[:2], *new_v.stride()[:2])
    arguments = (q, new_k, new_v, k, v, lengths, acc, stats, arrivals, out, Hkv, S, window, scale / math.log(2))
    strides = (*q.stride()[:2], *new_strides, *k.stride()[:3], *v.stride()[:3])
    tile = {"SPLITS": SPLITS, "GROUP": group, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": num_warps}
    tile |= {"BLOCK_P": triton.next_power_of_2(SPLITS), **dependent_launch(given, (k, v, lengths))}
    if shared:
        _decode_group_kernel[(B * Hkv, splits, cdiv(group, _GROUP))](*arguments, *strides, BLOCK_G=_GROUP, **tile)
    else:
        _decode_head_kernel[(B * H, splits)](*arguments, *strides, **tile)
    return out


def _tile(table: dict[int, tuple[int, int]], size: int) -> tuple[int, int]:
    return next(tile for most, tile in table.items() if size <= most)


def head_tile(D: int, itemsize: int) -> tuple[int, int]:
    """Keys of a block and warps of a program, where every head has its keys to itself."""
    return _tile(_HEAD_TILES, max(16, triton.next_power_of_2(D)) * itemsize)


def most_splits(programs: int) -> int:
    """Into how many shares a row's keys are divided at most, with so many programs for each share."""
    return max(1, min(_MOST_SPLITS, gpu().multiprocessors // programs))
