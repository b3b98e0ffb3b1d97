"""Adding up what several programs left behind: float32 partial sums, always in the same order.

    out[n] = sum over p of partial[p, n]        (+ out[n] where it accumulates)

Cost: one read of the partials, 4 P N bytes. No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv

FEW = 32  # partials that one thread adds up by itself


@triton.jit
def _add_partials_kernel(
    partial_ptr, out0_ptr, out1_ptr, P, N, stride_partial_p,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Each out (N,) = the sum of its own rows of partial (1 or 2, P, N), BLOCK_P rows at a time."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = col < N
    partial_ptr += tl.program_id(1).to(tl.int64) * P * stride_partial_p
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        mask = (row < P)[:, None] & col_mask[None, :]
        acc += tl.load(partial_ptr + row[:, None].to(tl.int64) * stride_partial_p + col[None, :], mask, other=0.0)
    total = tl.sum(acc, 0)
    out_ptr = out0_ptr if tl.program_id(1) == 0 else out1_ptr
    if ACCUMULATE:
        total += tl.load(out_ptr + col, col_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, total.to(out_ptr.dtype.element_ty), col_mask)


def add_partials(partial: torch.Tensor, *outs: torch.Tensor, accumulate: bool = False) -> None:
    """Writes into each contiguous out (one or two, of N elements) the sum of its partial (outs, P, N or more)."""
    _, P, width = partial.shape
    N = outs[0].numel()
    # Few rows are a matrix's parts, and wide; many rows are a vector's, and narrow: then threads share a column, and
    # the fewer columns a program has, the more programs there are to wait for the L2 cache at once. 8 are a sector's.
    # Chosen from the compile report, not yet measured.
    block_p, block_n = (1, 1024) if P <= FEW else (64, 32) if P <= 64 else (512, 8)
    _add_partials_kernel[(cdiv(N, block_n), len(outs))](
        partial, outs[0], outs[-1], P, N, width, BLOCK_P=block_p, BLOCK_N=block_n, ACCUMULATE=accumulate
    )
