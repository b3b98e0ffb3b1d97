"""GELU and SwiGLU, forward and backward: every element by itself.

    gelu(x) = x Phi(x), or its tanh form       dx = dy gelu'(x)
    swiglu(gate, up) = silu(gate) up           dgate = dy up silu'(gate),   dup = dy silu(gate)

Arithmetic is float32, rounded once, at the store. Nothing is saved but the inputs: the backward pass
computes the activation again, which costs less than reading it would.

Cost, n elements of b bytes: gelu 2 n b and backward 3 n b; swiglu 3 n b and backward 5 n b. Some 20 to 60
flops an element: memory's limit on every GPU in `compile_report.CHIPS`.

Arrays that are all contiguous are one long row. Otherwise each keeps its own distance between rows: gate
and up may be the two halves of one (..., 2F) product.

DEPENDENT (see `gpukernels.launches`): SwiGLU lets the next kernel start at once, which loads its weight meanwhile;
everything of its own stands behind the wait.

Hendrycks and Gimpel, arXiv 1606.08415; Shazeer, arXiv 2002.05202.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.activations import activate, activation_slope
from gpukernels.kernels.device import cdiv, dependent_launch, rows
from gpukernels.kernels.tiles import pointwise_tile


@triton.jit
def _block(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows (BLOCK_M, 1) and columns (1, BLOCK_N) of this program, and where they are inside (M, N)."""
    across = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    # One long row may have more than 2**31 columns.
    row = (program // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (program % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, col, (row < M) & (col < N)


@triton.jit
def _gelu_forward_kernel(
    x_ptr, y_ptr, M, N, stride_xm,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, mask = _block(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + col, mask, other=0.0).to(tl.float32)
    y = activate(x, ACTIVATION)
    tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, M, N, stride_dym, stride_xm,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, mask = _block(M, N, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + row * stride_dym + col, mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_xm + col, mask, other=0.0).to(tl.float32)
    dx = dy * activation_slope(x, ACTIVATION)
    tl.store(dx_ptr + row * N + col, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, M, N, stride_gate_m, stride_up_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, col, mask = _block(M, N, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + row * stride_gate_m + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up_m + col, mask, other=0.0).to(tl.float32)
    y = activate(gate, "silu") * up
    tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, M, N, stride_dym, stride_gate_m, stride_up_m,
    NEEDS_DGATE: tl.constexpr, NEEDS_DUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col, mask = _block(M, N, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + row * stride_dym + col, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate_m + col, mask, other=0.0).to(tl.float32)
    if NEEDS_DGATE:
        up = tl.load(up_ptr + row * stride_up_m + col, mask, other=0.0).to(tl.float32)
        dgate = dy * up * activation_slope(gate, "silu")
        tl.store(dgate_ptr + row * N + col, dgate.to(dgate_ptr.dtype.element_ty), mask)
    if NEEDS_DUP:
        dup = dy * activate(gate, "silu")
        tl.store(dup_ptr + row * N + col, dup.to(dup_ptr.dtype.element_ty), mask)


def gelu_forward(x, activation):
    """y; activation is "gelu" or "gelu_new"."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x,) = _as_rows(x)
    grid, tile = _grid(x)
    _gelu_forward_kernel[grid](x, y, *x.shape, x.stride(0), ACTIVATION=activation, **tile)
    return y


def gelu_backward(dy, x, activation):
    """dx."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, x = _as_rows(dy, x)
    grid, tile = _grid(x)
    _gelu_backward_kernel[grid](dy, x, dx, *x.shape, dy.stride(0), x.stride(0), ACTIVATION=activation, **tile)
    return dx


def swiglu_forward(gate, up):
    """y."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _as_rows(gate, up)
    grid, tile = _grid(gate)
    strides = (gate.stride(0), up.stride(0))
    _swiglu_forward_kernel[grid](gate, up, y, *gate.shape, *strides, **tile, **dependent_launch())
    return y


def swiglu_backward(dy, gate, up, *, needs_dgate, needs_dup):
    """dgate and dup; what is not needed comes back empty."""
    dgate = torch.empty(gate.shape if needs_dgate else 0, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape if needs_dup else 0, dtype=up.dtype, device=up.device)
    dy, gate, up = _as_rows(dy, gate, up)
    grid, tile = _grid(gate)
    _swiglu_backward_kernel[grid](
        dy, gate, up, dgate, dup, *gate.shape, dy.stride(0), gate.stride(0), up.stride(0),
        NEEDS_DGATE=needs_dgate, NEEDS_DUP=needs_dup, **tile,
    )  # fmt: skip
    return dgate, dup


def _as_rows(*arrays):
    """Arrays of one shape as (M, N): one long row where all are contiguous."""
    if all(x.is_contiguous() for x in arrays):
        return [x.view(1, x.numel()) for x in arrays]
    return [rows(x) for x in arrays]


def _grid(x):
    M, N = x.shape
    tile = pointwise_tile(N)
    return (cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),), tile._asdict()
