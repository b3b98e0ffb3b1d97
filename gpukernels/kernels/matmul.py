"""Matrix products with bias, activation and residual in the same kernel, and products with a long sum.

    z = a @ b + bias
    y = activation(z) + residual

a is (M, K), b (K, N), each stored by rows or by columns: a weight (N, K) comes as its transposed view. All is
added up in float32 and rounded once, when y is stored; z is stored too where the backward pass needs it.
Operands of two dtypes meet in float32, which holds both exactly. Products of float32 are float32's (not TF32).

Cost: 2 M N K flops. Each element of a is read cdiv(N, BLOCK_N) times and each of b cdiv(M, BLOCK_M) times,
mostly from the L2 cache: programs run side by side in groups of GROUP_M rows of tiles.

Two kernels. The one with pointers runs everywhere, for any strides and sizes. On sm_90 and sm_100, when rows
start at multiples of 16 bytes, the one with tensor descriptors does: as many programs as multiprocessors, each
taking tile after tile; blocks come and go by TMA; the result is stored in halves, which frees shared memory for
another stage of loads.

A product of few tiles and a long sum (dw = dz^T x, with K = B T) is cut along K into float32 partials that a
second kernel adds up in order. That depends on shapes and on the GPU, so it is not done where a row's bits
must not depend on the number of rows.

Grouped order of tiles, persistent programs: Triton's tutorials 03 and 09. Split sums: Osama et al., "Stream-K",
arXiv 2301.03598, section 3.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukernels.kernels.activations import activate
from gpukernels.kernels.device import cdiv, gpu, rows
from gpukernels.kernels.matmul_tiles import GROUP_M, descriptor_tile, pointer_tile, splits, too_few_wide_tiles
from gpukernels.kernels.partials import add_partials


@triton.jit
def _corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down GROUP_M tiles, then one to the right, and so on."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    inside = tile % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _multiply(a, b, acc):
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, bias_ptr, residual_ptr, z_ptr, out_ptr,
    M, N, K, read_m, read_n, split_k, stride_ag, stride_am, stride_ak, stride_bg, stride_bk, stride_bn,
    stride_residual_m, stride_zm, stride_og, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of one product. Those of a batch lie stride_.g apart; so do the parts, split_k long, of a split sum."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    first_row, first_col = _corner(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    if SPLIT:
        K = tl.minimum(K - tl.program_id(0) // tiles * split_k, split_k)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the end, or a little further (see `_readable`), the loads begin again at row 0 and column 0: what comes
    # of it is not stored, and there is no mask to keep the loads from being wide.
    from_row, from_col = (row % read_m).to(tl.int64), (col % read_n).to(tl.int64)
    a_ptrs = a_ptr + group * stride_ag + from_row[:, None] * stride_am + k[None, :].to(tl.int64) * stride_ak
    b_ptrs = b_ptr + group * stride_bg + k[:, None].to(tl.int64) * stride_bk + from_col[None, :] * stride_bn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // BLOCK_K):
        acc = _multiply(tl.load(a_ptrs), tl.load(b_ptrs), acc)
        a_ptrs += step * stride_ak
        b_ptrs += step * stride_bk
    if TAIL:
        k_mask = k < K % BLOCK_K
        a = tl.load(a_ptrs, k_mask[None, :], other=0.0)
        b = tl.load(b_ptrs, k_mask[:, None], other=0.0)
        acc = _multiply(a, b, acc)

    col_mask = col < N
    mask = (row < M)[:, None] & col_mask[None, :]
    row = row.to(tl.int64)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, col_mask, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + row[:, None] * stride_zm + col[None, :], acc.to(z_ptr.dtype.element_ty), mask)
    acc = activate(acc, ACTIVATION)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * stride_residual_m + col[None, :], mask, other=0.0)
        acc += residual.to(tl.float32)
    out_ptrs = out_ptr + group * stride_og + row[:, None] * stride_om + col[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _store_half(
    acc, row, out_row, col, N, bias, residual_desc, z_desc, out_desc, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr
):
    """The epilogue for WIDTH columns of a tile. Descriptors write nothing past the end."""
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    if z_desc is not None:
        z_desc.store([row, col], acc.to(z_desc.dtype))
    acc = activate(acc, ACTIVATION)
    if residual_desc is not None:
        acc += residual_desc.load([row, col]).to(tl.float32)
    out_desc.store([out_row, col], acc.to(out_desc.dtype))


@triton.jit
def _product_descriptor_kernel(
    a_desc, b_desc, bias_ptr, residual_desc, z_desc, out_desc, M, N, K, split_k, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_BY_COLUMN: tl.constexpr, B_BY_COLUMN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Program p of P makes the tiles p, p + P, ...; where the sum is split, those of each of its `parts` in turn.

    Part s of the result stands in the rows s * cdiv(M, BLOCK_M) * BLOCK_M and on.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles, steps = tiles_m * tiles_n, tl.cdiv(split_k, BLOCK_K)
    tl.assume(steps > 0)  # no other code for sums of nothing
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tiles * parts, tl.num_programs(0), flatten=True):
        part = tile // tiles
        row, col = _corner(tile % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, steps):
            k = part * split_k + step * BLOCK_K  # past the end of K a descriptor reads zeros
            a = a_desc.load([k, row]).T if A_BY_COLUMN else a_desc.load([row, k])
            b = b_desc.load([col, k]).T if B_BY_COLUMN else b_desc.load([k, col])
            acc = tl.dot(a, b, acc)
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        out_row = row + part * tiles_m * BLOCK_M
        bias_left = None
        bias_right = None
        if bias_ptr is not None:
            cols = col + tl.arange(0, HALF)
            bias_left = tl.load(bias_ptr + cols, cols < N, other=0.0)
            bias_right = tl.load(bias_ptr + HALF + cols, HALF + cols < N, other=0.0)
        _store_half(left, row, out_row, col, N, bias_left, residual_desc, z_desc, out_desc, HALF, ACTIVATION)
        _store_half(right, row, out_row, col + HALF, N, bias_right, residual_desc, z_desc, out_desc, HALF, ACTIVATION)


def product(a, b, *, bias=None, activation=None, residual=None, save_z=False, out_dtype=None, out=None):
    """y = activation(a @ b + bias) + residual, and z = a @ b + bias where `save_z`, else None.

    a (M, K) and b (K, N), or (G, M, K) and (G, K, N); then there is no bias, activation or residual. y has
    `out_dtype`, a's unless given. With `out`, whose elements neighbour in its rows, y is written there. It may be
    `residual` itself: product(a, b, residual=total, out=total) adds a @ b to a float32 total.
    """
    a, b = _by_rows_or_columns(a), _by_rows_or_columns(b)
    residual = None if residual is None else rows(residual)
    M, N = a.shape[-2], b.shape[-1]
    if out is None:
        out = torch.empty((*a.shape[:-1], N), dtype=out_dtype or a.dtype, device=a.device)
    z = torch.empty((M, N), dtype=a.dtype, device=a.device) if save_z else None
    if out.numel():
        _launch(a, b, bias, activation, residual, z, out, a.shape[-1])
    return out, z


def long_product(a, b, *, out_dtype=None, out=None, accumulate=False):
    """a @ b (M, N) for a long K: its bits may depend on M, N, K and the GPU, though never on the run.

    `out_dtype` and `out` as for `product`; with `accumulate`, a @ b is added to `out`.
    """
    a, b = _by_rows_or_columns(a), _by_rows_or_columns(b)
    (M, K), N = a.shape, b.shape[1]
    if out is None:
        out = torch.empty((M, N), dtype=out_dtype or a.dtype, device=a.device)
    narrow = too_few_wide_tiles(M, N, gpu())
    tile = pointer_tile(_dot_dtype(a, b))
    if _suit_descriptors(a, b) and N % 4 == 0:  # so that float32 rows are of 16 bytes
        tile = descriptor_tile(N, [torch.float32], narrow=narrow)
    tiles_m, steps = cdiv(M, tile.BLOCK_M), cdiv(K, tile.BLOCK_K)
    parts = splits(tiles_m * cdiv(N, tile.BLOCK_N), steps, gpu())
    split_k = cdiv(steps, parts) * tile.BLOCK_K
    if split_k >= K or not out.is_contiguous():
        if out.numel():
            _launch(a, b, None, None, out if accumulate else None, None, out, K, narrow)
        return out
    # Part by part, and in each as many rows as its tiles have: none writes into the next one's.
    partial = torch.empty((cdiv(K, split_k), tiles_m * tile.BLOCK_M, N), dtype=torch.float32, device=a.device)
    _launch(a, b, None, None, None, None, partial, split_k, narrow)
    add_partials(partial.view(1, len(partial), -1), out, accumulate=accumulate)
    return out


def _launch(a, b, bias, activation, residual, z, out, split_k, narrow=False):
    """Where `split_k` is less than K, out is (parts, M or more, N): the sums over split_k elements each."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    parts = cdiv(K, split_k) if split_k < K else 1
    ends = [each for each in (residual, z, out) if each is not None]
    if _suit_descriptors(a, b) and all(_rows_suit_descriptors(each) for each in ends):
        results = [each.dtype for each in (z, out) if each is not None]
        tile = descriptor_tile(N, results, None if residual is None else residual.dtype, narrow=narrow)
        a_by_column, b_by_column = a.stride(1) != 1, b.stride(1) != 1
        whole = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)
        half = (tile.BLOCK_M, tile.BLOCK_N // 2)
        tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
        _product_descriptor_kernel[(min(tiles * parts, gpu().multiprocessors),)](
            _descriptor(a, whole[0], whole[2], a_by_column), _descriptor(b, whole[2], whole[1], b_by_column),
            bias, *(each if each is None else _descriptor(each, *half) for each in (residual, z, out)),
            M, N, K, split_k, parts,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, GROUP_M=GROUP_M,
            A_BY_COLUMN=a_by_column, B_BY_COLUMN=b_by_column, ACTIVATION=activation,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return
    tile = pointer_tile(_dot_dtype(a, b))
    tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    if parts > 1:
        products, apart = parts, (split_k * a.stride(1), split_k * b.stride(0))
    else:
        products, apart = (1, (0, 0)) if a.ndim == 2 else (len(a), (a.stride(0), b.stride(0)))
    _product_kernel[(tiles * products,)](
        a, b, bias, residual, z, out,
        M, N, K, _readable(a, -2), _readable(b, -1), split_k, apart[0], *a.stride()[-2:], apart[1], *b.stride()[-2:],
        0 if residual is None else residual.stride(0), N,
        0 if out.ndim == 2 else out.stride(0), out.stride(-2),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, GROUP_M=GROUP_M,
        ACTIVATION=activation, SPLIT=parts > 1, TAIL=K % tile.BLOCK_K != 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _by_rows_or_columns(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where neither its rows nor its columns lie together in memory."""
    return x if 1 in x.stride()[-2:] else x.contiguous()


def _readable(x: torch.Tensor, dim: int) -> int:
    """How far along `dim` x may be read: its size, or the next multiple of 16 where all its memory goes so far.

    Where neighbours are read together, a load begins again at the first element only after a whole one. What
    lies behind a row (`empty_rows` leaves room there) is then read, and not used.
    """
    size, padded = x.shape[dim], cdiv(x.shape[dim], 16) * 16
    if padded == size or x.stride(dim) != 1 or x.stride(-3 - dim) < padded:
        return size
    last = x.storage_offset() + sum((each - 1) * stride for each, stride in zip(x.shape, x.stride(), strict=True))
    return padded if last + padded - size < x.untyped_storage().nbytes() // x.element_size() else size


def _dot_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return a.dtype if a.dtype == b.dtype else torch.float32


def _suit_descriptors(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether this GPU and these operands can have the kernel with descriptors."""
    if not gpu().takes_descriptors or _dot_dtype(a, b).itemsize != 2 or a.ndim != 2:
        return False
    return all(_rows_suit_descriptors(each if each.stride(1) == 1 else each.T) for each in (a, b))


def _rows_suit_descriptors(x: torch.Tensor) -> bool:
    """TMA takes rows that start at multiples of 16 bytes and do not overlap."""
    row = x.stride(-2)
    aligned = (row * x.element_size()) % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.stride(-1) == 1 and row >= x.shape[-1] and x.numel() > 0


def _descriptor(x: torch.Tensor, height: int, width: int, by_column: bool = False) -> TensorDescriptor:
    """Of x (rows, columns), whose blocks are height x width; with `by_column`, of its transposed view."""
    if x.ndim == 3:  # parts of a sum; a view of a single row would not keep its stride
        x = x.view(-1, x.shape[-1])
    return (
        TensorDescriptor.from_tensor(x.T, [width, height])
        if by_column
        else TensorDescriptor.from_tensor(x, [height, width])
    )
