"""Tiles of the matrix products, by dtype, shape and GPU. Chosen from N and the GPU, never from M.

So a row of a product has the same bits whatever stands in the other rows, and however many there are.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from gpukernels.kernels.device import Gpu, cdiv


class ProductTile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


#: Rows of tiles whose programs run side by side: what they read of b stays in the L2 cache.
GROUP_M = 8

# Through descriptors (sm_90, sm_100): probes on an H100, 2026-11-22, at 0.88 to 0.97 of cuBLAS's speed.
# One block a multiprocessor, of 4 warps in the second: its stages of loads in flight take the shared memory that
# another block would have.
_DESCRIPTOR_WIDE = ProductTile(128, 256, 64, 8, 4)
_DESCRIPTOR = ProductTile(128, 128, 64, 4, 5)
_WIDE = 1024  # columns of the result from which the wide tile is taken
# Through pointers: no spills, 16-byte asynchronous copies. Chosen from the compile report, not yet measured.
_POINTER = ProductTile(128, 128, 32, 8, 4)
_POINTER_SINGLE = ProductTile(128, 64, 16, 8, 3)

# Of the 227 KiB that a block may have on sm_90 and sm_100, less what barriers need.
_SHARED_MEMORY = 225 << 10


def pointer_tile(dtype: torch.dtype) -> ProductTile:
    """The tile for operands of `dtype`. float32's products are multiply-adds, with both operands in registers."""
    return _POINTER_SINGLE if dtype == torch.float32 else _POINTER


def descriptor_tile(
    N: int, results: Iterable[torch.dtype], residual: torch.dtype | None = None, *, narrow: bool = False
) -> ProductTile:
    """The tile for a result of N columns, stored in each of the dtypes `results`, with a residual of that dtype."""
    # Halves of a tile leave through one buffer for each dtype; on sm_100 those of float32 through one each.
    staged = sum(2 * dtype.itemsize if dtype == torch.float32 else dtype.itemsize for dtype in set(results))
    staged += 0 if residual is None else residual.itemsize  # and a residual comes in through one of its own
    tile = _fitted(_DESCRIPTOR_WIDE, staged)
    # With fewer than three stages the loads do not keep up.
    return tile if N >= _WIDE and not narrow and tile.num_stages >= 3 else _fitted(_DESCRIPTOR, staged)


def too_few_wide_tiles(M: int, N: int, gpu: Gpu) -> bool:
    """Whether multiprocessors would have nothing to do: asked only where a row's bits may depend on M."""
    wide = _DESCRIPTOR_WIDE
    return cdiv(M, wide.BLOCK_M) * cdiv(N, wide.BLOCK_N) < gpu.multiprocessors


def _fitted(tile: ProductTile, staged: int) -> ProductTile:
    """As many of the tile's stages as fit beside `staged` bytes for each element of half a tile."""
    stage = 2 * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K
    left = _SHARED_MEMORY - staged * tile.BLOCK_M * tile.BLOCK_N // 2
    return tile._replace(num_stages=min(tile.num_stages, left // stage))


def splits(tiles: int, steps: int, gpu: Gpu) -> int:
    """How many programs share the sum of one tile: there are `tiles`, of `steps` blocks of K each.

    The number with which the last program would be done first, where writing a partial tile and adding it up
    counts as 12 steps: 128 x 128 float32 values there and back are 131 KB, 5.7 us of one multiprocessor's share of
    an H100's memory (3.02 TB/s); a step is 2.1 MFLOP, 0.46 us of its share of 600 TFLOP/s. An estimate, not yet
    measured.
    """

    def time(parts: int) -> int:
        return cdiv(tiles * parts, gpu.multiprocessors) * (cdiv(steps, parts) + 12 * (parts > 1))

    return min(range(1, 33), key=time)
