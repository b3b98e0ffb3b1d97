"""How big a pass is, and in which dtype it computes."""

import functools
from collections.abc import Iterable

import numpy as np

# Elements that an elementwise pass handles at a time: 256 KiB of float32, and as much scratch,
# fit the 1 MiB second-level cache of a current core.
BLOCK = 65536


@functools.cache
def compute_dtype(dtype: np.dtype) -> np.dtype:
    return np.promote_types(dtype, np.float32)


def row_blocks(rows: np.ndarray) -> Iterable[slice]:
    """Slices of whole rows, about `BLOCK` elements each."""
    if rows.size <= BLOCK:
        return (slice(None),)
    step = max(1, BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
