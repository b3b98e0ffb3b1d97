"""The backward pass of `linear`: y = activation(z) + residual, z = x @ weight.T + bias.

    dz = dy * activation'(z)             one pass over dy and z, which also makes dbias
    dbias = sum of dz over the rows      of dz before it is rounded
    dx = dz @ weight                     a product like the forward one
    dweight = dz.T @ x                   few tiles and a long sum: cut along the rows, see `long_product`

Without an activation dz is dy. dresidual is dy.

Cost, M rows: 4 M N K flops; dz reads dy and z and writes dz, 3 M N elements.

dz's rows are dealt to programs as those of the norms' backward pass are: each keeps a column's sum in registers
and writes one float32 row, and a second kernel adds these rows up in order.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.activations import activation_slope
from gpukernels.kernels.device import cdiv, gpu, rows
from gpukernels.kernels.matmul import long_product, product
from gpukernels.kernels.partials import add_partials

# Rows and columns at a time, warps, programs per multiprocessor: 16 elements in a thread. Chosen from the compile
# report (16-byte accesses, no spills), not yet measured.
BLOCK_M, BLOCK_N, NUM_WARPS, PER_MULTIPROCESSOR = 16, 128, 4, 8


@triton.jit
def _activation_backward_kernel(
    dy_ptr, z_ptr, dz_ptr, partial_ptr, M, N, stride_dym, stride_zm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of BLOCK_N columns at a time; program p of P takes the blocks of rows p, p + P, p + 2 P, ..."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = col < N
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(program * BLOCK_M, M, programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & col_mask[None, :]
        row = row.to(tl.int64)[:, None]
        dz = tl.load(dy_ptr + row * stride_dym + col[None, :], mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            z = tl.load(z_ptr + row * stride_zm + col[None, :], mask, other=0.0).to(tl.float32)
            dz *= activation_slope(z, ACTIVATION)
            tl.store(dz_ptr + row * stride_zm + col[None, :], dz.to(dz_ptr.dtype.element_ty), mask)
        if partial_ptr is not None:
            dbias += dz
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * N + col, tl.sum(dbias, 0), col_mask)


def linear_backward(dy, z, x, weight, bias, activation, *, needs_dx, needs_dweight, needs_dbias):
    """dx, dweight and dbias, in the dtypes of x, weight and bias; what is not needed comes back empty."""
    dy = rows(dy)
    x_rows = x.reshape(dy.shape[0], x.shape[-1])
    dbias = torch.empty(
        len(weight) if needs_dbias else 0, dtype=(bias if needs_dbias else weight).dtype, device=x.device
    )
    dz = _differentiate(dy, z, activation, dbias if needs_dbias else None)
    dx = torch.empty(x.shape if needs_dx else 0, dtype=x.dtype, device=x.device)
    if needs_dx:
        product(dz, weight, out=dx.view(x_rows.shape))
    dweight = torch.empty(weight.shape if needs_dweight else 0, dtype=weight.dtype, device=x.device)
    if needs_dweight:
        long_product(dz.T, x_rows, out=dweight)
    return dx, dweight, dbias


def _differentiate(dy, z, activation, dbias):
    """dz (M, N), which is dy without an activation; writes dbias unless it is None."""
    M, N = dy.shape
    z = z if activation is None else rows(z)
    dz = dy if activation is None else torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    columns = cdiv(N, BLOCK_N)
    programs = min(cdiv(M, BLOCK_M), cdiv(gpu().multiprocessors * PER_MULTIPROCESSOR, max(1, columns)))
    partial = None if dbias is None else torch.empty((1, programs, N), dtype=torch.float32, device=dy.device)
    if dy.numel() and (activation is not None or dbias is not None):
        _activation_backward_kernel[(programs, columns)](
            dy, z, dz, partial, M, N, dy.stride(0), z.stride(0),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, ACTIVATION=activation, num_warps=NUM_WARPS,
        )  # fmt: skip
    if dbias is not None and N:
        add_partials(partial, dbias)
    return dz
