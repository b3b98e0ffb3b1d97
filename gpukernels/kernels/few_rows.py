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
exchange between lanes or through shared memory. It is the second factor, of which an instruction takes two registers
that neighbour as they were loaded. As the first one, of four registers of two rows, it would be copied together
first: behind the wait, and so the next kernel and the rows of x would wait for the weight. The compile tests hold
both.

A K that is more than the registers hold is multiplied in passes, one part of the weight after the other: the next
part is loaded before this one meets the rows, whose sums so far wait in float32 memory that no other program sees
(8 M N bytes a pass, which stay in the L2 cache). Two such programs find room on a multiprocessor. So a product is
one launch, whatever K is. The norm of a row that 8 warps cannot hold beside the weight, or that thousands of
programs would repeat, is a launch of its own.

DEPENDENT (see `gpukernels.launches`): the weight (of passes, the first two), the bias and the norm's parameters are
loaded before the wait: no kernel of a step writes them. x and the residual, which the kernels before wrote, are
loaded behind it, and y is stored, when whoever reads what stood there has ended. The next kernel may start at once,
where there is a norm behind the wait. It can where its programs find registers beside these, of which they should
have half a multiprocessor's at most.
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
    PASSES: int  # parts of K, one after the other
    fused: bool  # a norm is in the prologue


# Bytes of one row of the weight that so many warps hold, 16 of them with 64 registers a thread. Chosen from the
# compile report (spills of 16 bytes at most on sm_80 to sm_100), not yet measured. 16 rows of the weight where that
# makes a program for each multiprocessor, as for QKV and up, and 8 for the projection: so did the probes on an H100,
# 2026-11-22.
_HELD = {8: 3328, 16: 8192}
# And of a pass, in 8 warps beside the next pass: with 128 registers a thread two programs find room.
_PASS = 2048
# A norm holds three times as much, in 8 warps. It is in the prologue up to this many programs on a
# multiprocessor: with more of them, a launch of its own is cheaper.
_NORMS = 4
# Bytes of a row beside which a norm still finds registers: all 255 of them (no spills on sm_80 to sm_100). In 16 bits
# an RMS norm, which has no bias to hold: up to 2048 columns. In float32, which has the weight in shared memory: so
# rows up to GPT-2 XL's take no launch more than 16-bit ones.
_HELD_NORMED = {2: 4096, 4: 6400}


def few_rows_tile(N: int, K: int, itemsize: int, *, norm: bool, rms: bool = False) -> FewRowsTile:
    """The tile for a weight (N, K) beside an x of elements of `itemsize` bytes; rms: the norm is an RMS norm."""
    multiprocessors = gpu().multiprocessors
    BLOCK_N = 16 if 16 * multiprocessors <= N else 8
    held = K * itemsize
    # Copies to shared memory start together; plain loads would be started one after the other's product. Two
    # copies of wide rows, or one beside what float32's product keeps there, would be more than an RTX 4090 has.
    stages = 3 if itemsize == 2 else 1
    fused = norm and cdiv(N, BLOCK_N) <= _NORMS * multiprocessors
    if held <= _HELD[8] or (fused and rms and itemsize == 2 and held <= _HELD_NORMED[2]):
        return FewRowsTile(BLOCK_N, 8, stages, 1, fused)
    if norm and itemsize == 4 and held <= _HELD_NORMED[4] and cdiv(N, 8) <= 2 * _NORMS * multiprocessors:
        return FewRowsTile(8, 8, stages, 1, True)
    if held <= _HELD[16] and cdiv(N, 8) <= multiprocessors:
        return FewRowsTile(8, 16, 2 if itemsize == 2 else 1, 1, False)
    return FewRowsTile(8, 8, stages, cdiv(held, _PASS), False)


@triton.jit
def _operand(tile, WARPS: tl.constexpr, HALVES: tl.constexpr):
    """(8, WARPS, HALVES, 32) as loaded -> (WARPS, 8 HALVES, 32) for a product, with K in the order of its lanes."""
    # Four lanes of eight elements: the first four of each lane make one instruction's 16, two in either half.
    tile = tl.reshape(tile, (8, WARPS, HALVES, 4, 2, 2, 2))
    return tl.reshape(tl.permute(tile, (1, 2, 0, 4, 5, 3, 6)), (WARPS, 8 * HALVES, 32))


@triton.jit
def _piece(pointers, k, there, K: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr):
    """Elements k of K; masked if this is not among the first WHOLE pieces, which never pass the end.

    there: whether to load at all; None: always. Without, what comes back is not to be used.
    """
    if there is None:
        piece = tl.load(pointers) if PIECE < WHOLE else tl.load(pointers, k < K, other=0.0)
    else:
        piece = tl.load(pointers, there) if PIECE < WHOLE else tl.load(pointers, there & (k < K), other=0.0)
    return piece


@triton.jit
def weight_places(weight_ptr, tile, N, stride_wn, stride_wk, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """Pointers to the first piece of the tile's rows, (row, warp, half, element), and its places in K.

    Rows past the end are the last one again.
    """
    half = 8 * tl.arange(0, BLOCK_N // 8)
    n = tile * BLOCK_N + tl.arange(0, 8)[:, None, None, None] + half[None, None, :, None]
    k = 32 * tl.arange(0, WARPS)[None, :, None, None] + tl.arange(0, 32)[None, None, None, :]
    return weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * stride_wn + k.to(tl.int64) * stride_wk, k


@triton.jit
def load_weights(
    weight_ptr, k, there, stride_wk,
    K: tl.constexpr, FIRST: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr, HALVES: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Up to PIECES pieces of the weight from FIRST on, those that there are, as a product wants them.

    weight_ptr, k: of `weight_places`; there: see `_piece`.
    """
    STEP: tl.constexpr = WARPS * 32
    WHOLE: tl.constexpr = K // STEP
    ALL: tl.constexpr = max(1, (K + STEP - 1) // STEP)
    weight_ptr += tl.full((), FIRST * STEP, tl.int64) * stride_wk
    weights = ()
    for piece in tl.static_range(FIRST, min(FIRST + PIECES, ALL)):
        weight = _piece(weight_ptr, k + piece * STEP, there, K, piece, WHOLE)
        weight_ptr += STEP * stride_wk
        weights = weights + (tl.permute(_operand(weight.to(dtype), WARPS, HALVES), (0, 2, 1)),)
    return weights


@triton.jit
def load_norm(norm_ptr, k, K: tl.constexpr, WARPS: tl.constexpr):
    """Every piece of a norm's weight or bias, a copy for each row of x: every lane has what it needs where it needs it.

    k: places in K, (1, warp, element).
    """
    STEP: tl.constexpr = WARPS * 32
    copies = tl.zeros((8, 1, 1), tl.int32) + k
    pieces = ()
    for piece in tl.static_range(max(1, (K + STEP - 1) // STEP)):
        each = copies + piece * STEP
        pieces = pieces + (_piece(norm_ptr + each, each, None, K, piece, K // STEP),)
    return pieces


@triton.jit
def multiply_rows(
    x_ptr, residual_ptr, partial_ptr, y_ptr, weights, norm_weights, norm_biases, bias,
    k, col, M, N, stride_xm, stride_residual_m, eps,
    K: tl.constexpr, WARPS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, ALL: tl.constexpr,
    CENTER: tl.constexpr, ACTIVATION: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """All rows of x meet `weights`, pieces FIRST to FIRST + COUNT of ALL: into y at the last one, else into partial.

    HOIST: what is the same for all rows may be made in front of them, such as a norm's parameters in float32, which
    take twice the registers.
    """
    STEP: tl.constexpr = WARPS * 32
    WHOLE: tl.constexpr = K // STEP
    LAST: tl.constexpr = FIRST + COUNT == ALL
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Sums that do not wait for each other: tensor cores answer late.
    CHAINS: tl.constexpr = 1 if dtype == tl.float32 else min(4, 1 + COUNT // 3)
    row = tl.arange(0, 8)
    for start in tl.range(0, M, 8, disable_licm=not HOIST):
        m = tl.minimum(start + row, M - 1).to(tl.int64)
        pieces = ()
        for piece in tl.static_range(COUNT):
            at = k + (FIRST + piece) * STEP
            at_row = x_ptr + m[:, None, None] * stride_xm
            pieces = pieces + (_piece(at_row + at, at, None, K, FIRST + piece, WHOLE),)
        m = start + row.to(tl.int64)
        mask = (m < M)[:, None] & (col < N)[None, :]
        place = m[:, None] * N + col[None, :]
        # Now: they come while the sums are made.
        if FIRST > 0:
            partial = tl.load(partial_ptr + place, mask, other=0.0)
        if LAST and residual_ptr is not None:
            residual = tl.load(residual_ptr + m[:, None] * stride_residual_m + col[None, :], mask, other=0.0)

        if norm_weights is not None:
            if CENTER:
                total = tl.zeros((8, WARPS, 32), tl.float32)
                for piece in tl.static_range(COUNT):
                    total += pieces[piece].to(tl.float32)
                mean = (tl.sum(tl.sum(total, 2), 1) / K)[:, None, None]
            squares = tl.zeros((8, WARPS, 32), tl.float32)
            for piece in tl.static_range(COUNT):
                deviation = pieces[piece].to(tl.float32)
                if CENTER:
                    deviation -= mean
                    if piece >= WHOLE:
                        deviation = tl.where(k + piece * STEP < K, deviation, 0.0)
                squares += deviation * deviation
            rstd = (1 / tl.sqrt_rn(tl.sum(tl.sum(squares, 2), 1) / K + eps))[:, None, None]

        sums = ()
        for piece in tl.static_range(COUNT):
            h = pieces[piece]
            if norm_weights is not None:
                h = h.to(tl.float32)
                if CENTER:
                    h -= mean
                h = h * rstd * norm_weights[piece].to(tl.float32)  # 0 past the end, as the bias is
                if norm_biases is not None:
                    h += norm_biases[piece].to(tl.float32)
                h = h.to(dtype)
            h = _operand(h, WARPS, 1)
            if piece < CHAINS:
                sums = sums + (tl.dot(h, weights[piece], input_precision="ieee"),)
            else:
                sums = sums[1:] + (tl.dot(h, weights[piece], sums[0], input_precision="ieee"),)
        acc = sums[0]
        for chain in tl.static_range(1, CHAINS):
            acc = tl.fma(sums[chain], 1.0, acc)  # a plain sum would be made one chain again
        y = tl.sum(acc, 0)  # over the warps

        if FIRST > 0:
            y += partial
        if LAST:
            if bias is not None:
                y += bias[None, :]
            y = activate(y, ACTIVATION)
            if residual_ptr is not None:
                y += residual.to(tl.float32)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask)
        else:
            tl.store(partial_ptr + place, y, mask)


# M is in no binary: the code that forms a row is the same whatever M is.
@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, residual_ptr, partial_ptr, y_ptr,
    M, N, stride_xm, stride_wn, stride_wk, stride_residual_m, eps,
    K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, PIECES: tl.constexpr, PASSES: tl.constexpr,
    CENTER: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y (M, N), in passes by way of partial (M, N). WARPS is num_warps, PIECES what a pass has at most.

    The tensors of four dimensions are (row, warp, half, element).
    """
    STEP: tl.constexpr = WARPS * 32
    ALL: tl.constexpr = max(1, (K + STEP - 1) // STEP)
    HALVES: tl.constexpr = BLOCK_N // 8
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)

    if DEPENDENT and norm_weight_ptr is None:
        tl.extra.cuda.gdc_launch_dependents()
    # Everything down to the wait is constant while a model runs.
    weight_ptr, k4 = weight_places(weight_ptr, tile, N, stride_wn, stride_wk, BLOCK_N, WARPS)
    weights = load_weights(weight_ptr, k4, None, stride_wk, K, 0, PIECES, WARPS, HALVES, dtype)
    following = load_weights(weight_ptr, k4, None, stride_wk, K, PIECES, PIECES, WARPS, HALVES, dtype)
    k = 32 * tl.arange(0, WARPS)[None, :, None] + tl.arange(0, 32)[None, None, :]
    norm_weights = None
    norm_biases = None
    if norm_weight_ptr is not None:
        norm_weights = load_norm(norm_weight_ptr, k, K, WARPS)
        if norm_bias_ptr is not None:
            norm_biases = load_norm(norm_bias_ptr, k, K, WARPS)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        if norm_weight_ptr is not None:
            tl.extra.cuda.gdc_launch_dependents()

    for each in tl.static_range(PASSES):
        multiply_rows(
            x_ptr, residual_ptr, partial_ptr, y_ptr, weights, norm_weights, norm_biases, bias,
            k, col, M, N, stride_xm, stride_residual_m, eps,
            K, WARPS, each * PIECES, min(PIECES, ALL - each * PIECES), ALL, CENTER, ACTIVATION, norm_weight_ptr is None,
        )  # fmt: skip
        weights = following
        if each < PASSES - 1:
            tl.debug_barrier()  # what some threads of this program have stored, others load
            following = load_weights(
                weight_ptr, k4, None, stride_wk, K, (each + 2) * PIECES, PIECES, WARPS, HALVES, dtype
            )


def few_rows(x, weight, bias=None, *, norm=None, activation=None, residual=None):
    """y (..., N) of x's dtype. norm: (weight, bias or None, eps, center), of an RMS norm where center is False.

    Right for every M, and made for 1 to 64.
    """
    shape, x = (*x.shape[:-1], weight.shape[0]), rows(x)
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tile = few_rows_tile(N, K, x.element_size(), norm=norm is not None, rms=norm is not None and not norm[3])
    norm_weight = norm_bias = None
    eps, center = 0.0, False
    if norm is not None:
        norm_weight, norm_bias, eps, center = norm
        if not tile.fused:
            x = norm_forward(x, norm_weight, norm_bias, None, eps, center=center)[0]
            norm_weight = norm_bias = None
    given = (norm_weight, norm_bias, bias)
    norm_weight, norm_bias, bias = early = tuple(None if each is None else each.contiguous() for each in given)
    residual = None if residual is None else rows(residual)
    pieces = max(1, cdiv(K, tile.num_warps * 32))
    each = cdiv(pieces, tile.PASSES)
    passes = cdiv(pieces, each)
    partial = torch.empty((M, N), dtype=torch.float32, device=x.device) if passes > 1 else None
    half = passes > 1 or (tile.num_warps == 16 and x.element_size() == 2)  # a multiprocessor's registers, at most
    _few_rows_kernel[(cdiv(N, tile.BLOCK_N),)](
        x, norm_weight, norm_bias, weight, bias, residual, partial, y,
        M, N, x.stride(0), weight.stride(0), weight.stride(1), 0 if residual is None else residual.stride(0), eps,
        K=K, BLOCK_N=tile.BLOCK_N, WARPS=tile.num_warps,
        PIECES=each, PASSES=passes, CENTER=center, ACTIVATION=activation,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=1024 // tile.num_warps if half else None,
        **dependent_launch(given, early),
    )  # fmt: skip
    return y
