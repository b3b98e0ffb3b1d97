"""What attention's kernels share: which keys a query sees, which queries see a key, and how tiles are loaded.

Every query sees one interval of keys, and both its ends only grow with the query's position p:

    first(p) = max(0, start of p's document, p - window + 1)
    last(p)  = min(length, end of p's document, p + 1 if causal)           (exclusive)

So a block of queries needs the keys from first(its first) to last(its last), sees those from first(its last)
to last(its first) without any mask, and only what lies between needs one. The same holds with queries and
keys exchanged. Positions count from the row's first key; query i stands at p = length - T + i, and a query
at a negative position is padding and sees nothing.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukernels.kernels.device import gpu

MOST_ROWS = 65535  # CUDA's limit for the third dimension of a grid, which is the batch here


@triton.jit
def seen_keys(p, length, bounds_ptr, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The interval of keys [first, last) that each query at position p sees; empty for padding.

    bounds_ptr: this row's documents, their starts at 0 and their ends at S, or None.
    WINDOW: 0 for none.
    """
    first = tl.zeros_like(p)
    last = tl.zeros_like(p) + length
    inside = (p >= 0) & (p < length)
    if WINDOW:
        first = tl.maximum(first, p - WINDOW + 1)
    if bounds_ptr is not None:
        first = tl.maximum(first, tl.load(bounds_ptr + p, inside, other=0))
        last = tl.minimum(last, tl.load(bounds_ptr + S + p, inside, other=0))
    if CAUSAL:
        last = tl.minimum(last, p + 1)
    return first, tl.where(inside, last, 0)


@triton.jit
def seeing_queries(j, length, bounds_ptr, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The interval of positions [first, last) whose queries see key j; empty for a key that is not in use."""
    first = tl.zeros_like(j)
    last = tl.zeros_like(j) + length
    inside = j < length
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + j, inside, other=0)
        last = tl.minimum(last, tl.load(bounds_ptr + S + j, inside, other=0))
    if CAUSAL:
        first = tl.maximum(first, j)
    if WINDOW:
        last = tl.minimum(last, j + WINDOW)
    return first, tl.where(inside, last, 0)


@triton.jit
def _borders(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """(lo, a, b, hi): in steps of BLOCK, [lo, a) and [b, hi) need a mask, [a, b) is whole blocks that do not."""
    # Not cut at hi: where lo and full_lo are 0, a is a constant then, which spares the walk registers.
    a = lo + tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK) * BLOCK
    b = a + tl.maximum(full_hi - a, 0) // BLOCK * BLOCK
    return lo, a, b, hi


@triton.jit
def key_sections(
    row, length, T, S, bounds_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """For the BLOCK_M queries from `row`: the interval of each, and the borders of the keys to walk."""
    offset = length - T
    p = offset + row + tl.arange(0, BLOCK_M)
    first, last = seen_keys(p, length, bounds_ptr, S, CAUSAL, WINDOW)
    # Of the first query that is not padding, and of the last. Where there is padding no block is full.
    lo, full_hi = seen_keys(tl.maximum(offset + row, 0), length, bounds_ptr, S, CAUSAL, WINDOW)
    full_lo, hi = seen_keys(offset + tl.minimum(row + BLOCK_M, T) - 1, length, bounds_ptr, S, CAUSAL, WINDOW)
    full_hi = tl.where(offset + row < 0, 0, full_hi)
    return first, last, _borders(lo, full_lo, full_hi, hi, BLOCK_N)


@triton.jit
def query_sections(
    n, length, T, S, bounds_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """For the BLOCK_N keys from `n`: each one's interval of positions, and the borders of the query rows to walk."""
    offset = length - T
    first, last = seeing_queries(n + tl.arange(0, BLOCK_N), length, bounds_ptr, S, CAUSAL, WINDOW)
    n_last = tl.minimum(n + BLOCK_N, length) - 1
    lo, full_hi = seeing_queries(n, length, bounds_ptr, S, CAUSAL, WINDOW)
    full_lo, hi = seeing_queries(n_last, length, bounds_ptr, S, CAUSAL, WINDOW)
    # Positions become rows; those below 0 do not exist. A block with keys that are not in use is never full.
    lo = tl.maximum(lo - offset, 0)
    hi = tl.where(n < length, hi - offset, 0)
    full_hi = tl.where(n + BLOCK_N <= length, full_hi - offset, 0)
    return first, last, _borders(lo, tl.minimum(full_lo - offset, hi), full_hi, hi, BLOCK_M)


@triton.jit
def load_rows(
    source, batch, row, head, stride_b, stride_t, stride_h, rows, D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head as a tile (ROWS, BLOCK_D), with zeros beyond `rows` and D.

    source: a pointer to (B, T, H, D), or a tensor descriptor of it, which always checks its borders.
    CHECK: whether some of the rows may be beyond `rows`.
    """
    if TMA:
        tile = source.load([batch, row, head, 0]).reshape(ROWS, BLOCK_D)
    else:
        index = row + tl.arange(0, ROWS)
        col = tl.arange(0, BLOCK_D)
        start = source + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        pointers = start + index[:, None].to(tl.int64) * stride_t + col[None, :]
        if CHECK and BLOCK_D != D:
            tile = tl.load(pointers, (index < rows)[:, None] & (col < D)[None, :], other=0.0)
        elif CHECK:
            tile = tl.load(pointers, (index < rows)[:, None], other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(pointers, (col < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(tile, out_ptr, row, stride_t, rows, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes those of the ROWS rows of a tile that exist; out_ptr points at row 0 of one head."""
    index = row + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    pointers = out_ptr + index[:, None].to(tl.int64) * stride_t + col[None, :]
    tl.store(pointers, tile.to(out_ptr.dtype.element_ty), (index < rows)[:, None] & (col < D)[None, :])


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _document_bounds_kernel(documents_ptr, bounds_ptr, S, stride_b, BLOCK: tl.constexpr):
    """bounds (B, 2, S): where the run of equal numbers that j belongs to starts, and where it ends."""
    documents_ptr += tl.program_id(0).to(tl.int64) * stride_b
    bounds_ptr += tl.program_id(0).to(tl.int64) * 2 * S
    start = 0
    for block in range(0, S, BLOCK):
        j = block + tl.arange(0, BLOCK)
        here = tl.load(documents_ptr + j, j < S, other=0)
        before = tl.load(documents_ptr + j - 1, (j > 0) & (j < S), other=0)
        starts = tl.where((here != before) | (j == 0), j, 0)
        starts = tl.maximum(tl.associative_scan(starts, 0, _larger), start)
        start = tl.max(starts, 0)
        tl.store(bounds_ptr + j, starts, j < S)
    end = S
    for block in range(0, S, BLOCK):
        j = (tl.cdiv(S, BLOCK) * BLOCK - BLOCK - block) + tl.arange(0, BLOCK)
        here = tl.load(documents_ptr + j, j < S, other=0)
        after = tl.load(documents_ptr + j + 1, j + 1 < S, other=0)
        ends = tl.where((here != after) & (j + 1 < S), j + 1, S)
        ends = tl.minimum(tl.associative_scan(ends, 0, _smaller, reverse=True), end)
        end = tl.min(ends, 0)
        tl.store(bounds_ptr + S + j, ends, j < S)


def document_bounds(documents: torch.Tensor) -> torch.Tensor:
    """(B, 2, S) int32 of documents (B, S): the start of each token's document and, in [:, 1], its end."""
    batch, S = documents.shape
    documents = documents if documents.stride(1) == 1 else documents.contiguous()
    bounds = torch.empty((batch, 2, S), dtype=torch.int32, device=documents.device)
    # 1024 tokens at a time, 8 a thread. Chosen from the compile report, not yet measured.
    _document_bounds_kernel[(batch,)](documents, bounds, S, documents.stride(0), BLOCK=1024, num_warps=4)
    return bounds


def in_parts(function: Callable, *arrays: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What `function` gives for the arrays (B, ...), called for no more rows at a time than a grid has."""
    parts = []
    for start in range(0, len(arrays[0]), MOST_ROWS):
        stop = start + MOST_ROWS
        parts.append(function(*(None if x is None else x[start:stop] for x in arrays)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def unit_inner_stride(*arrays: torch.Tensor) -> list[torch.Tensor]:
    """The arrays, those copied whose last dimension is not contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in arrays]


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can address x (..., D): 16-byte rows and base, and a GPU that has one."""
    size = x.element_size()
    return (
        gpu().takes_descriptors
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride * size % 16 == 0 and stride > 0 for stride in x.stride()[:-1])
    )


def descriptor(x: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of x (B, T, H, D) whose blocks are `rows` rows of one head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, block_d])
