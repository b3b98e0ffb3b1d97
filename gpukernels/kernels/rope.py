"""Rotary position embedding: each pair of elements of a head turned by an angle that grows with its position.

    angle = position * frequency[i]                       float32
    (a, b) -> (a cos - b sin, b cos + a sin)

Pair i is the elements (i, i + R/2) of the R that rotate, or (2i, 2i + 1) when interleaved; the elements
from R on pass through. The gradient is turned back by the same angle, so the same kernel makes it: nothing
is saved but the positions.

Sine and cosine are of the float32 angle, reduced exactly however large it is, and are computed where they
are used: a table of them would have to be read.

DEPENDENT (see `gpukernels.launches`): the next kernel may start at once, as attention, which loads old keys
meanwhile; everything of its own stands behind the wait.

Cost, n elements of b bytes: reads x, writes y, 2 n b. Sine and cosine are made once for BLOCK_H heads.

Su et al., arXiv 2104.09864.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, dependent_launch
from gpukernels.kernels.tiles import rope_tile


@triton.jit
def _rope_kernel(
    x_ptr, positions_ptr, frequencies_ptr, y_ptr,
    T, H, stride_xb, stride_xt, stride_xh, stride_pb, stride_pt,
    D: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads at one position. HALF pairs rotate, D - 2 HALF elements pass through."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    head_mask = head < H
    x_ptr += b * stride_xb + t * stride_xt + head.to(tl.int64) * stride_xh
    y_ptr += (token.to(tl.int64) * H + head) * D

    pair = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.float32)
    angle = position * tl.load(frequencies_ptr + pair, pair < HALF, other=0.0)
    cos, sin = tl.cos(angle)[None, :], SIGN * tl.sin(angle)[None, :]

    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = head_mask & (both < 2 * HALF)
        x = tl.load(x_ptr + both, mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_HALF, 2)))
        y = tl.join(first * cos - second * sin, second * cos + first * sin)
        y = tl.reshape(y, (BLOCK_H, 2 * BLOCK_HALF))
        tl.store(y_ptr + both, y.to(y_ptr.dtype.element_ty), mask)
    else:
        pair = pair[None, :]
        mask = head_mask & (pair < HALF)
        first = tl.load(x_ptr + pair, mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + HALF + pair, mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + pair, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask)
        tl.store(y_ptr + HALF + pair, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask)

    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = head_mask & (rest < D)
        tl.store(y_ptr + rest, tl.load(x_ptr + rest, mask, other=0.0), mask)


def rotate(x, positions, frequencies, *, interleaved, inverse):
    """x turned by its positions' angles, or back; contiguous."""
    B, T, H, D = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    frequencies = frequencies.contiguous()
    half = frequencies.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = rope_tile(H, D)
    _rope_kernel[(B * T, cdiv(H, tile.BLOCK_H))](
        x, positions, frequencies, y, T, H, *x.stride()[:3], *positions.stride(),
        D=D, HALF=half, SIGN=-1.0 if inverse else 1.0, INTERLEAVED=interleaved,
        BLOCK_H=tile.BLOCK_H, BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, D - 2 * half)), num_warps=tile.num_warps, **dependent_launch(),
    )  # fmt: skip
    return y
