"""Cross entropy over a vocabulary: the loss, its gradient, or both at once.

    lse  = log(sum_j exp(x_j))
    loss = w ((1 - a) (lse - x_t) + a (lse - mean(x)) + z lse^2)
    dx_j = g (p_j (1 + 2 z lse) - (1 - a) [j = t] - a / V),   p_j = exp(x_j - lse)

t is the token's target, w its weight, a the label smoothing, z the z-loss; g is w times the upstream gradient,
over the mean's divisor where the losses are averaged. An ignored token has loss 0 and gradient 0 whatever its
logits hold. A target outside the vocabulary is never read: the token's loss and gradient are NaN.

One program takes one row. A running maximum and sum are kept for each lane, 8 neighbouring logits that lie in
one thread: one exponential in nine is a rescaling, and nothing crosses threads before the end of the row.

Cost, M rows of V logits of b bytes:
    the loss              reads M V b, and saves lse, 4 bytes a row
    the gradient, later   reads and writes 2 M V b; what comes from upstream is folded in before the rounding
    both at once          2 M V b of memory traffic: the second reading of a row finds it in the L2 cache
At 8192 x 50304 in bfloat16 one pass is 824 MB, 0.27 ms at 3.02 TB/s: 0.82 ms for the loss and later the
gradient, 0.55 for both at once. There, a row is 101 KB; two on each of an H100's 132 multiprocessors, half
read on average, are 13 MB of its 50 MB of L2; four would be 27 MB, beside what is stored. So the tile has registers
for two, and spends them on the block behind the one at work. The first reading asks the cache to keep the row; the
second and the stores ask it to give theirs up first. (A probe, 2026-11-22, took 0.93 ms: as long as three passes
through memory.) The 2.1 exponentials an element come to 0.24 ms of an H100's special function units,
beside the traffic. Not yet measured.

Sums over the tokens are one program's, in one order. No atomics: the same input gives the same bits.

Milakov and Gimelshein, arXiv 1805.02867 (online softmax); Szegedy et al., arXiv 1512.00567 (label smoothing);
Chowdhery et al., arXiv 2204.02311, section 5 (z-loss).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, rows


class Tile(NamedTuple):
    BLOCK_V: int  # logits at a time
    num_warps: int


# Vocabulary up to -> tile: 8 or 16 logits a thread. The last has 43 to 64 registers, so that two rows of a large
# vocabulary share a multiprocessor and no more. Chosen from the compile report, not yet measured.
_TILES = {1024: Tile(1024, 4), 4096: Tile(4096, 8)}
_LARGE = Tile(8192, 16)
# At a time, in the sums over the tokens, of 16 warps. Chosen from the compile report, not yet measured.
_TOKENS = 4096

LOG2E = tl.constexpr(1.4426950408889634)
# Where a maximum starts. Not at -inf: its difference from a logit of -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _columns(BLOCK_V: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _add_lanes(x, most, total):
    """x (lanes, WIDTH) into each lane's running maximum and sum of exp(x - maximum)."""
    larger = tl.maximum(most, tl.max(x, 1))
    pieces = tl.sum(tl.exp2((x - larger[:, None]) * LOG2E), 1)
    return larger, total * tl.exp2((most - larger) * LOG2E) + pieces


@triton.jit
def _row_statistics(x_ptr, V, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, SMOOTHED: tl.constexpr, EVICT: tl.constexpr):
    """max(x), log(sum(exp(x - max(x)))) and, where SMOOTHED, sum(x) of one row."""
    col = _columns(BLOCK_V, WIDTH)
    most = tl.full((BLOCK_V // WIDTH,), LOWEST, tl.float32)
    total, logits = tl.zeros((BLOCK_V // WIDTH,), tl.float32), tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    # A mask costs the 16-byte loads where V is no multiple of 16: whole blocks go without.
    whole = V // BLOCK_V * BLOCK_V
    block = tl.load(x_ptr + col, whole > 0, other=0.0, eviction_policy=EVICT)
    for start in range(0, whole, BLOCK_V):
        behind = start + BLOCK_V
        following = tl.load(x_ptr + behind + col, behind < whole, other=0.0, eviction_policy=EVICT)
        x = block.to(tl.float32)
        most, total = _add_lanes(x, most, total)
        if SMOOTHED:
            logits += tl.sum(x, 1)
        block = following
    for start in range(whole, V, BLOCK_V):  # once, or not at all
        mask = start + col < V
        x = tl.load(x_ptr + start + col, mask, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)
        most, total = _add_lanes(x, most, total)
        if SMOOTHED:
            logits += tl.sum(tl.where(mask, x, 0.0), 1)
    largest = tl.max(most, 0)
    total = tl.sum(total * tl.exp2((most - largest) * LOG2E), 0)
    return largest, tl.log(total), tl.sum(logits, 0)


@triton.jit
def _gradient(x, col, target, lse, on_p, on_target, on_all):
    """on_p * exp(x - lse) - on_target [col = target] - on_all."""
    p = tl.exp2((x.to(tl.float32) - lse) * LOG2E)
    return p * on_p - tl.where(col == target, on_target + on_all, on_all)


@triton.jit
def _store_gradient(
    x_ptr, dx_ptr, V, target, lse, g, label_smoothing, z_loss, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr
):
    """One row's gradient. dx may be x: a block is read before it is written, once."""
    on_p = g * (1 + 2 * z_loss * lse)
    on_target, on_all = g * (1 - label_smoothing), g * label_smoothing / V
    col = _columns(BLOCK_V, WIDTH)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = tl.load(x_ptr + start + col, eviction_policy="evict_first")
        dx = _gradient(x, start + col, target, lse, on_p, on_target, on_all)
        tl.store(dx_ptr + start + col, dx.to(dx_ptr.dtype.element_ty), eviction_policy="evict_first")
    for start in range(whole, V, BLOCK_V):
        mask = start + col < V
        x = tl.load(x_ptr + start + col, mask, other=0.0, eviction_policy="evict_first")
        dx = _gradient(x, start + col, target, lse, on_p, on_target, on_all)
        tl.store(dx_ptr + start + col, dx.to(dx_ptr.dtype.element_ty), mask, eviction_policy="evict_first")


@triton.jit
def _store_zeros(dx_ptr, V, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr):
    col = _columns(BLOCK_V, WIDTH)
    zeros = tl.zeros((BLOCK_V // WIDTH, WIDTH), dx_ptr.dtype.element_ty)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        tl.store(dx_ptr + start + col, zeros)
    for start in range(whole, V, BLOCK_V):
        tl.store(dx_ptr + start + col, zeros, start + col < V)


@triton.jit
def _upstream(dloss_ptr, weights_ptr, divisor_ptr, row, stride_dloss):
    """g of one token; what is None counts as 1."""
    g = 1.0
    if dloss_ptr is not None:
        g = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    if weights_ptr is not None:
        g *= tl.load(weights_ptr + row).to(tl.float32)
    if divisor_ptr is not None:
        g /= tl.load(divisor_ptr)
    return g


@triton.jit
def _cross_entropy_kernel(
    x_ptr, targets_ptr, weights_ptr, divisor_ptr, dloss_ptr, loss_ptr, lse_ptr, dx_ptr,
    V, stride_xm, stride_dxm, ignore_index, label_smoothing, z_loss,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """One row's weighted loss; its lse where lse_ptr is given, its gradient where dx_ptr is (which may be x_ptr)."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, 0.0)
        if dx_ptr is not None:
            _store_zeros(dx_ptr + row * stride_dxm, V, BLOCK_V, WIDTH)
        return
    inside = (target >= 0) & (target < V)
    # Read before the row is: its gradient may be written over it.
    x_target = tl.load(x_ptr + target, inside, other=float("nan")).to(tl.float32)
    EVICT: tl.constexpr = "evict_last" if dx_ptr is not None else "evict_first"
    largest, log_total, logits = _row_statistics(x_ptr, V, BLOCK_V, WIDTH, SMOOTHED, EVICT)
    lse = largest + log_total
    # From the largest logit, not from lse: what is near 0 keeps its digits.
    if SMOOTHED:
        away = (1 - label_smoothing) * (largest - x_target) + label_smoothing * (largest - logits / V)
    else:
        away = largest - x_target
    loss = log_total + away + z_loss * lse * lse
    if weights_ptr is not None:
        loss *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, loss)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)
    if dx_ptr is not None:
        g = _upstream(dloss_ptr, weights_ptr, divisor_ptr, row, 0)
        g = tl.where(inside, g, float("nan"))
        _store_gradient(x_ptr, dx_ptr + row * stride_dxm, V, target, lse, g, label_smoothing, z_loss, BLOCK_V, WIDTH)


@triton.jit
def _cross_entropy_backward_kernel(
    dloss_ptr, x_ptr, targets_ptr, weights_ptr, divisor_ptr, lse_ptr, dx_ptr,
    V, stride_dloss, stride_xm, stride_dxm, ignore_index, label_smoothing, z_loss,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's gradient, from the lse that the forward pass saved."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    dx_ptr += row * stride_dxm
    if target == ignore_index:
        _store_zeros(dx_ptr, V, BLOCK_V, WIDTH)
        return
    g = _upstream(dloss_ptr, weights_ptr, divisor_ptr, row, stride_dloss)
    g = tl.where((target >= 0) & (target < V), g, float("nan"))
    lse = tl.load(lse_ptr + row)
    _store_gradient(x_ptr + row * stride_xm, dx_ptr, V, target, lse, g, label_smoothing, z_loss, BLOCK_V, WIDTH)


@triton.jit
def _divisor_kernel(targets_ptr, weights_ptr, divisor_ptr, M, ignore_index, BLOCK_M: tl.constexpr):
    """How many tokens are not ignored, or the sum of their weights."""
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        counted = (tl.load(targets_ptr + row, row < M, other=0) != ignore_index) & (row < M)
        if weights_ptr is None:
            acc += counted.to(tl.float32)
        else:
            acc += tl.load(weights_ptr + row, counted, other=0.0).to(tl.float32)
    tl.store(divisor_ptr, tl.sum(acc, 0))


@triton.jit
def _total_kernel(loss_ptr, divisor_ptr, total_ptr, M, BLOCK_M: tl.constexpr):
    """The sum of M losses, over the divisor if there is one."""
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        acc += tl.load(loss_ptr + row, row < M, other=0.0)
    total = tl.sum(acc, 0)
    if divisor_ptr is not None:
        total /= tl.load(divisor_ptr)
    tl.store(total_ptr, total)


def _tile(vocabulary: int) -> Tile:
    return next((tile for most, tile in _TILES.items() if vocabulary <= most), _LARGE)


def _width(dtype: torch.dtype) -> int:
    """Logits of a lane: those of 16 bytes."""
    return 16 // dtype.itemsize


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def empty_rows(shape, dtype: torch.dtype, device) -> torch.Tensor:
    """An array (..., V) whose rows start at multiples of 64 elements, whatever V is."""
    *outer, V = shape
    return torch.empty((*outer, cdiv(V, 64) * 64), dtype=dtype, device=device)[..., :V]


def divisor_of(targets, weights, ignore_index):
    """What a mean of losses is divided by, float32 (1,)."""
    divisor = torch.empty(1, dtype=torch.float32, device=targets.device)
    _divisor_kernel[(1,)](
        _flat(targets), _flat(weights), divisor,
        targets.numel(), ignore_index, BLOCK_M=_TOKENS, num_warps=16,
    )  # fmt: skip
    return divisor


def total_of(loss, divisor):
    """The sum of the losses, over `divisor` unless that is None; float32 ()."""
    total = torch.empty((), dtype=torch.float32, device=loss.device)
    _total_kernel[(1,)](loss, divisor, total, loss.numel(), BLOCK_M=_TOKENS, num_warps=16)
    return total


def losses(
    x, targets, weights, ignore_index, label_smoothing, z_loss, *, loss, lse=None, dx=None, dloss=None, divisor=None
):
    """Writes the losses (M,) of rows x (M, V), and what else is given to be written; dx may be x itself."""
    M, V = x.shape
    tile = _tile(V)
    _cross_entropy_kernel[(M,)](
        x, _flat(targets), _flat(weights), divisor, dloss, loss, lse, dx,
        V, x.stride(0), 0 if dx is None else dx.stride(0), ignore_index, label_smoothing, z_loss,
        BLOCK_V=tile.BLOCK_V, WIDTH=_width(x.dtype), SMOOTHED=label_smoothing != 0, num_warps=tile.num_warps,
    )  # fmt: skip


def cross_entropy_forward(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction):
    """loss, lse (M,) and the mean's divisor, which is empty for another reduction."""
    options = (targets, weights, ignore_index, label_smoothing, z_loss)
    loss, lse = (torch.empty(targets.numel(), dtype=torch.float32, device=logits.device) for _ in range(2))
    losses(rows(logits), *options, loss=loss, lse=lse)
    if reduction == "none":
        return loss.view(targets.shape), lse, torch.empty(0, dtype=torch.float32, device=logits.device)
    if reduction == "sum":
        return total_of(loss, None), lse, torch.empty(0, dtype=torch.float32, device=logits.device)
    divisor = divisor_of(targets, weights, ignore_index)
    return total_of(loss, divisor), lse, divisor


def cross_entropy_backward(dloss, logits, targets, weights, lse, divisor, ignore_index, label_smoothing, z_loss):
    """dlogits; dloss is () or has the targets' shape."""
    dlogits = empty_rows(logits.shape, logits.dtype, logits.device)
    x, dx = rows(logits), rows(dlogits)
    M, V = x.shape
    tile = _tile(V)
    stride_dloss = 0
    if dloss.ndim:
        dloss = dloss.reshape(-1)
        stride_dloss = dloss.stride(0)
    _cross_entropy_backward_kernel[(M,)](
        dloss, x, _flat(targets), _flat(weights),
        divisor if divisor.numel() else None, lse, dx,
        V, stride_dloss, x.stride(0), dx.stride(0), ignore_index, label_smoothing, z_loss,
        BLOCK_V=tile.BLOCK_V, WIDTH=_width(x.dtype), num_warps=tile.num_warps,
    )  # fmt: skip
    return dlogits


def cross_entropy_with_gradient(logits, targets, weights, ignore_index, label_smoothing, z_loss, reduction, scale):
    """loss, and dlogits of the loss times `scale`, a float32 array of one element (None: 1)."""
    divisor = divisor_of(targets, weights, ignore_index) if reduction == "mean" else None
    loss = torch.empty(targets.numel(), dtype=torch.float32, device=logits.device)
    dlogits = empty_rows(logits.shape, logits.dtype, logits.device)
    options = (targets, weights, ignore_index, label_smoothing, z_loss)
    losses(rows(logits), *options, loss=loss, dx=rows(dlogits), dloss=scale, divisor=divisor)
    return (loss.view(targets.shape) if reduction == "none" else total_of(loss, divisor)), dlogits
