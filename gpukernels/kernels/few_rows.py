"""The product of few rows, M of 1 to 64, with the norm before it and what comes after it fused.

    h = norm(x)                                        layer norm, RMS norm, or x itself; of x's dtype
    y = activation(h @ weight.T + bias) + residual     in float32, rounded once, when stored

The weight is what costs: N K b bytes for elements of b bytes, read once, and 2 M N K flops. Without tensor
cores an H100 (3 TB/s, 60 TFLOP/s in float32) would multiply float16 more slowly than it reads it from 20 rows
on, and would add up 32 lanes for every row and output. So tensor cores do the product for every M, and a row
is summed in the same order in every batch. (Float32 is multiplied without them, and passes shared memory.)
Every program reads x, from the L2 cache: N / BLOCK_N M K b bytes, for 64 rows of 768 -> 2304 four times the weight.

A program holds BLOCK_N rows of the weight in registers, whole; each of its warps has its own part of K, and the
warps' sums are added in the end. Rows of x pass eight at a time. M is the bound of that loop and nothing else:
not in a tile, not specialised, not in the grid. One binary serves every M, so **a row gets the same bits
whatever M and its neighbours are**. (The norm's sums are made by other lanes where x allows no 16-byte loads.)

A piece of a warp's K is 32 elements: 16 bytes for each of four lanes. A tensor-core instruction wants other
places, for each lane two elements here and two 8 further. But a sum may take its products in any order, if
both factors do: `_operand` renames the places, and the weight goes from the load to the product without an
exchange between lanes or through shared memory. The compile tests hold this.

A long K is split between programs where the registers end, and further where N is too small to fill the GPU:
by N, K, the dtype and the device, never by M. That costs a second launch and 8 S M N bytes for S splits, whose
float32 sums are added in their order. The norm of a row that 8 warps cannot hold beside the weight, or that
thousands of programs would repeat, is a launch of its own.

DEPENDENT (see `gpukernels.launches`): the weight, the bias and the norm's parameters are loaded before the wait.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpukernels.kernels.activations import activate
from gpukernels.kernels.device import cdiv, dependent_launch, gpu, rows
from gpukernels.kernels.norm import norm_forward


class FewRowsTile(NamedTuple):
    BLOCK_N: int  # rows of the weight in a program: 8, or 16, a whole tensor-core instruction
    num_warps: int
    num_stages: int  # 3: the next rows of x are on their way to shared memory while these are multiplied
    SPLITS: int  # programs that share one K
    fused: bool  # a norm is in the prologue


# Bytes of one row of the weight that so many warps hold. Chosen from the compile report (spills of 16 bytes at
# most on sm_80 to sm_100), not yet measured. 16 rows of the weight where that makes a program for each
# multiprocessor, as for QKV and up, and 8 for the projection: so did the probes on an H100, 2026-11-22.
_HELD = {8: 3328, 16: 10240}
# A norm holds three times as much, in 8 warps. It is in the prologue up to this many programs on a
# multiprocessor: with more of them, a launch of its own is cheaper.
_NORMS = 4


def few_rows_tile(N: int, K: int, itemsize: int, *, norm: bool) -> FewRowsTile:
    """The tile for a weight (N, K) beside an x of elements of `itemsize` bytes."""
    multiprocessors = gpu().multiprocessors
    BLOCK_N = 16 if 16 * multiprocessors <= N else 8
    tiles, held = cdiv(N, BLOCK_N), K * itemsize
    # Copies to shared memory start together; plain loads would be started one after the other's product. Two
    # copies of wide rows, or one beside what float32's product keeps there, would be more than an RTX 4090 has.
    if held <= _HELD[8]:
        stages = 3 if itemsize == 2 else 1
        return FewRowsTile(BLOCK_N, 8, stages, 1, norm and tiles <= _NORMS * multiprocessors)
    if itemsize == 4:  # whose weight passes shared memory: of 16 rows more than an RTX 4090 has, or an A100
        BLOCK_N, tiles = 8, cdiv(N, 8)
    splits = cdiv(held, _HELD[16])
    if splits > 1:  # then more of them are no further launch: as many as run at once
        splits = max(splits, min(multiprocessors // tiles, held // _HELD[8]))
    return FewRowsTile(BLOCK_N, 16, 2 if itemsize == 2 else 1, splits, False)


@triton.jit
def _operand(tile, WARPS: tl.constexpr, HALVES: tl.constexpr):
    """(8, WARPS, HALVES, 32) as loaded -> (WARPS, 8 HALVES, 32) for a product, with K in the order of its lanes."""
    # Four lanes of eight elements: the first four of each lane make one instruction's 16, two in either half.
    tile = tl.reshape(tile, (8, WARPS, HALVES, 4, 2, 2, 2))
    return tl.reshape(tl.permute(tile, (1, 2, 0, 4, 5, 3, 6)), (WARPS, 8 * HALVES, 32))


@triton.jit
def _piece(pointers, k, K: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr):
    """Elements k of K; masked if this is not among the first WHOLE pieces, which never pass the end."""
    return tl.load(pointers) if PIECE < WHOLE else tl.load(pointers, k < K, other=0.0)


# M is in no binary: the code that forms a row is the same whatever M is.
@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, stride_xm, stride_wn, stride_wk, stride_residual_m, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr,
    CENTER: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y (SPLITS, M, N); WARPS is num_warps. The tensors of four dimensions are (row, warp, half, element)."""
    STEP: tl.constexpr = WARPS * 32
    WHOLE: tl.constexpr = (K - (SPLITS - 1) * PIECES * STEP) // STEP  # pieces inside K, in the last split too
    HALVES: tl.constexpr = BLOCK_N // 8
    NORM: tl.constexpr = norm_weight_ptr is not None
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Sums that do not wait for each other: tensor cores answer late.
    CHAINS: tl.constexpr = 1 if dtype == tl.float32 else min(4, 1 + PIECES // 3)
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, 8)
    half = 8 * tl.arange(0, HALVES)
    warp = split * PIECES * STEP + 32 * tl.arange(0, WARPS)
    element = tl.arange(0, 32)

    # Everything down to the wait is constant while a model runs. Rows past the end are the last one again.
    n = tl.minimum(first + row[:, None, None, None] + half[None, None, :, None], N - 1).to(tl.int64)
    k = warp[None, :, None, None] + element[None, None, None, :]
    weight_ptr += n * stride_wn + k.to(tl.int64) * stride_wk
    weights = ()
    for piece in tl.static_range(PIECES):
        weight = _piece(weight_ptr, k + piece * STEP, K, piece, WHOLE)
        weight_ptr += STEP * stride_wk
        weights = weights + (_operand(weight.to(dtype), WARPS, HALVES),)
    k = warp[None, :, None] + element[None, None, :]
    if NORM:
        # One copy for each row, so that every lane has what it needs where it needs it.
        copies = tl.zeros((8, 1, 1), tl.int32) + k
        norm_weights = ()
        norm_biases = ()
        for piece in tl.static_range(PIECES):
            each = copies + piece * STEP
            norm_weights = norm_weights + (_piece(norm_weight_ptr + each, each, K, piece, WHOLE),)
            if norm_bias_ptr is not None:
                norm_biases = norm_biases + (_piece(norm_bias_ptr + each, each, K, piece, WHOLE),)
    col = first + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    for start in range(0, M, 8):
        m = tl.minimum(start + row, M - 1).to(tl.int64)
        pieces = ()
        for piece in tl.static_range(PIECES):
            at = k + piece * STEP
            pieces = pieces + (_piece(x_ptr + m[:, None, None] * stride_xm + at, at, K, piece, WHOLE),)
        m = start + row.to(tl.int64)
        mask = (col < N)[:, None] & (m < M)[None, :]
        if residual_ptr is not None:  # now: it comes while the sums are made
            residual = tl.load(residual_ptr + m[None, :] * stride_residual_m + col[:, None], mask, other=0.0)

        if NORM:
            if CENTER:
                total = tl.zeros((8, WARPS, 32), tl.float32)
                for piece in tl.static_range(PIECES):
                    total += pieces[piece].to(tl.float32)
                mean = (tl.sum(tl.sum(total, 2), 1) / K)[:, None, None]
            squares = tl.zeros((8, WARPS, 32), tl.float32)
            for piece in tl.static_range(PIECES):
                deviation = pieces[piece].to(tl.float32)
                if CENTER:
                    deviation -= mean
                    if piece >= WHOLE:
                        deviation = tl.where(k + piece * STEP < K, deviation, 0.0)
                squares += deviation * deviation
            rstd = (1 / tl.sqrt_rn(tl.sum(tl.sum(squares, 2), 1) / K + eps))[:, None, None]

        sums = ()
        for piece in tl.static_range(PIECES):
            h = pieces[piece]
            if NORM:
                h = h.to(tl.float32)
                if CENTER:
                    h -= mean
                h = h * rstd * norm_weights[piece].to(tl.float32)  # 0 past the end, as the bias is
                if norm_bias_ptr is not None:
                    h += norm_biases[piece].to(tl.float32)
                h = h.to(dtype)
            h = tl.permute(_operand(h, WARPS, 1), (0, 2, 1))
            if piece < CHAINS:
                sums = sums + (tl.dot(weights[piece], h, input_precision="ieee"),)
            else:
                sums = sums[1:] + (tl.dot(weights[piece], h, sums[0], input_precision="ieee"),)
        acc = sums[0]
        for chain in tl.static_range(1, CHAINS):
            acc = tl.fma(sums[chain], 1.0, acc)  # a plain sum would be made one chain again
        y = tl.sum(acc, 0)  # over the warps

        if bias_ptr is not None:
            y += bias[:, None]
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            y += residual.to(tl.float32)
        tl.store(y_ptr + (split * M + m)[None, :] * N + col[:, None], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def _few_rows_finish_kernel(
    partial_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, stride_residual_m,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y (M, N) = activation(the sum of partial (SPLITS, M, N) + bias) + residual, a row's BLOCK_N at a time."""
    m = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = col < N
    y = tl.load(partial_ptr + m * N + col, mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(partial_ptr + (split * M + m) * N + col, mask, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m * stride_residual_m + col, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + col, y.to(y_ptr.dtype.element_ty), mask)


def few_rows(x, weight, bias=None, *, norm=None, activation=None, residual=None):
    """y (..., N) of x's dtype. norm: (weight, bias or None, eps, center), of an RMS norm where center is False.

    Right for every M, and made for 1 to 64.
    """
    shape, x = (*x.shape[:-1], weight.shape[0]), rows(x)
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tile = few_rows_tile(N, K, x.element_size(), norm=norm is not None)
    norm_weight = norm_bias = None
    eps, center = 0.0, False
    if norm is not None:
        norm_weight, norm_bias, eps, center = norm
        norm_weight, norm_bias = norm_weight.contiguous(), None if norm_bias is None else norm_bias.contiguous()
        if not tile.fused:
            x = norm_forward(x, norm_weight, norm_bias, None, eps, center=center)[0]
            norm_weight = norm_bias = None
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows(residual)
    after = (bias, residual, y)
    stride_residual_m = 0 if residual is None else residual.stride(0)
    split = tile.SPLITS > 1
    partial = torch.empty((tile.SPLITS, M, N) if split else 0, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(cdiv(N, tile.BLOCK_N), tile.SPLITS)](
        x, norm_weight, norm_bias, weight, *((None, None, partial) if split else after),
        M, N, x.stride(0), weight.stride(0), weight.stride(1), 0 if split else stride_residual_m, eps,
        K=K, BLOCK_N=tile.BLOCK_N, WARPS=tile.num_warps,
        PIECES=max(1, cdiv(K, tile.SPLITS * tile.num_warps * 32)), SPLITS=tile.SPLITS,
        CENTER=center, ACTIVATION=None if split else activation,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **dependent_launch(),
    )  # fmt: skip
    if split:
        _few_rows_finish_kernel[(cdiv(N, 128), M)](
            partial, *after, M, N, stride_residual_m,
            BLOCK_N=128, SPLITS=tile.SPLITS, ACTIVATION=activation, num_warps=1,
        )  # fmt: skip
    return y
