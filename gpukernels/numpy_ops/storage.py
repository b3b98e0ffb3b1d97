"""Products of float32 rows with float16 weights: half the memory, and float32 arithmetic.

A block of a weight is widened, used and forgotten, while it is in a core's cache. BLAS has threads for the product and
NumPy none for the widening, which takes nine tenths of the time: so one row is multiplied in threads of our own,
each of which has some of the weight's rows. A result's bits do not depend on how many there are.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from gpukernels.cast import WIDENED, widen_float16
from gpukernels.threads import pool, threads


def product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """rows (M, K) float32 @ weight.T, (N, K) float16, as a new (M, N) float32 array."""
    if not weight.flags.c_contiguous:
        return _by_input(rows, weight.T)
    y = np.empty((len(rows), len(weight)), np.float32)
    if len(rows) != 1:
        for part, block in _blocks(weight):
            np.matmul(rows, block.T, out=y[:, part])
        return y
    count = max(1, min(threads(), 2 * weight.size // WIDENED))
    ends = [len(weight) * each // count for each in range(count + 1)]
    parts = [slice(*each) for each in itertools.pairwise(ends)]
    others = [pool().submit(_dot, weight[part], rows[0], y[0, part]) for part in parts[1:]]
    _dot(weight[parts[0]], rows[0], y[0, parts[0]])
    for each in others:
        each.result()
    return y


def _dot(weight: np.ndarray, row: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(all="ignore"):  # every thread has its own
        for part, block in _blocks(weight):
            np.vecdot(block, row, out=out[part])


def _by_input(rows: np.ndarray, storage: np.ndarray) -> np.ndarray:
    """rows (M, K) @ storage (K, N): blocks of its rows give sums that add up."""
    y = np.zeros((len(rows), storage.shape[1]), np.float32)
    for part, block in _blocks(storage):
        y += np.matmul(rows[:, part], block)
    return y


def _blocks(storage: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Where each block of rows is, and what it is in float32, until the next one is asked for."""
    step = max(1, WIDENED // max(1, storage.shape[1]))
    scratch = np.empty((min(step, len(storage)), storage.shape[1]), np.float32)
    for start in range(0, len(storage), step):
        part = slice(start, start + step)
        block = scratch[: len(storage[part])]
        widen_float16(np.ascontiguousarray(storage[part]), block)
        yield part, block
