"""Embedding: rows of a table, plus rows of a table of positions, and the gradients of the tables.

    y[m] = weight[ids[m]] + position_weight[positions[m]]
    dtable[i] = sum of dy[m] over the m that read row i

The sums are float32, rounded once. Nothing is read outside a table: an index that has no row gives a row
of NaN, and adds to no gradient.

Forward, M rows of C elements of b bytes: 3 M C b, 2 M C b without positions; rows that were read before
come from the cache. Backward of a table of V rows: reads dy and writes the gradient, (M + V) C b, and sorts M
indices.

In the backward pass the indices are sorted first, so that those of a row stand together, in their order.
One program adds up one row: no atomics, the same bits every time. A row that very many indices read, as a
padding token is, takes as long as its program takes to read all of their dy.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, rows
from gpukernels.kernels.tiles import embedding_tile


@triton.jit
def table_row(table_ptr, index, count, stride_m, stride_n, col, mask):
    """The row `index` of a table of `count` rows, float32; NaN where there is none."""
    inside = (index >= 0) & (index < count)
    row_ptr = table_ptr + index.to(tl.int64) * stride_m
    return tl.load(row_ptr + col.to(tl.int64) * stride_n, mask & inside, other=float("nan")).to(tl.float32)


@triton.jit
def _embedding_forward_kernel(
    ids_ptr, weight_ptr, positions_ptr, position_weight_ptr, y_ptr,
    V, P, C, stride_wv, stride_wc, stride_pp, stride_pc,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A part of one row of y."""
    m = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = col < C
    y = table_row(weight_ptr, tl.load(ids_ptr + m), V, stride_wv, stride_wc, col, mask)
    if positions_ptr is not None:
        y += table_row(position_weight_ptr, tl.load(positions_ptr + m), P, stride_pp, stride_pc, col, mask)
    tl.store(y_ptr + m * C + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _embedding_backward_kernel(
    dy_ptr, order_ptr, firsts_ptr, dtable_ptr, C, stride_dym, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A part of one row of a table's gradient. order[firsts[i] : firsts[i + 1]] are the rows of dy that read row i."""
    index = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, end = tl.load(firsts_ptr + index), tl.load(firsts_ptr + index + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_M):
        k = start + tl.arange(0, BLOCK_M)
        m = tl.load(order_ptr + k, k < end, other=0)
        mask = (k < end)[:, None] & (col < C)[None, :]
        acc += tl.load(dy_ptr + m[:, None] * stride_dym + col[None, :], mask, other=0.0).to(tl.float32)
    tl.store(dtable_ptr + index * C + col, tl.sum(acc, 0).to(dtable_ptr.dtype.element_ty), col < C)


def embedding_forward(ids, weight, positions, position_weight, dtype):
    """y (..., C) of `dtype`."""
    (V, C), M = weight.shape, ids.numel()
    y = torch.empty((*ids.shape, C), dtype=dtype, device=weight.device)
    P, strides = (0, (0, 0)) if positions is None else (position_weight.shape[0], position_weight.stride())
    positions = None if positions is None else positions.contiguous()
    tile = embedding_tile(C)
    _embedding_forward_kernel[(M, cdiv(C, tile.BLOCK_C))](
        ids.contiguous(), weight, positions, position_weight, y, V, P, C, *weight.stride(), *strides,
        BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def embedding_backward(dy, indices, count, dtype):
    """The gradient (count, C), of `dtype`, of the table whose rows `indices` dy is upstream of."""
    C = dy.shape[-1]
    dtable = torch.empty((count, C), dtype=dtype, device=dy.device)
    dy = rows(dy)
    ordered, order = torch.sort(indices.reshape(-1), stable=True)
    every = torch.arange(count + 1, dtype=indices.dtype, device=dy.device)
    firsts = torch.searchsorted(ordered, every, out_int32=True)
    tile = embedding_tile(C)
    _embedding_backward_kernel[(count, cdiv(C, tile.BLOCK_C))](
        dy, order, firsts, dtable, C, dy.stride(0),
        BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps,
    )  # fmt: skip
    return dtable
