"""A GPU's memories for a batch of blocks: every access is checked before it is made.

An address of global memory is the host's own; only the arrays that a launch was given may be touched. Shared memory
starts full of NaN.
"""

import ctypes
from collections.abc import Callable, Iterable

import numpy as np

from gpukernels.emulator.faults import MemoryFault, Race
from gpukernels.emulator.races import Accesses

UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

#: Where a block's shared memory starts: not at 0, which is nobody's, and as TMA's patterns need it.
SHARED_BASE = 1024
POISON = 0xFF


class GlobalMemory:
    """The arrays of a launch: `ranges` of first address and size, and the threads of its blocks."""

    def __init__(self, ranges: Iterable[tuple[int, int]], threads: int):
        merged: list[list[int]] = []
        for start, size in sorted(each for each in ranges if each[1]):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self._starts = np.array([start for start, _ in merged], np.int64)
        self._ends = np.array([end for _, end in merged], np.int64)
        self._base = int(self._starts[0]) // 256 * 256 if merged else 0
        span = (int(self._ends[-1]) - self._base) // 256 * 256 + 256 if merged else 0
        sizes = self._ends - self._starts
        self._before = np.cumsum(sizes) - sizes  # bytes of the ranges in front of each
        self.accesses = Accesses(int(sizes.sum()), threads)
        # No copy, and never read outside the ranges.
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self._base)) if span else np.empty(0, np.uint8)
        self._views = {size: raw.view(kind) for size, kind in UINTS.items()}

    def _places(self, addresses, size: int, count: int, what: str):
        """Indices of elements, and of all bytes among those of the ranges."""
        addresses = addresses.astype(np.int64)
        whole = size * count
        crooked = addresses % whole != 0
        if crooked.any():
            raise MemoryFault(f"{what} of {whole} bytes at {int(addresses[crooked][0]):#x}, not aligned to them")
        if not len(self._starts):
            raise MemoryFault(f"{what} of {whole} bytes, and the launch has no arrays")
        index = np.searchsorted(self._starts, addresses, "right") - 1
        inside = (index >= 0) & (addresses + whole <= self._ends[index])
        if not inside.all():
            at = int(addresses[~inside][0])
            raise MemoryFault(f"{what} of {whole} bytes at {at:#x}, which is in none of the launch's arrays")
        first = (addresses - self._base) // size
        compact = addresses - self._starts[index] + self._before[index]
        return first[:, None] + np.arange(count), compact[:, None] + np.arange(whole)

    def load(self, addresses, size: int, count: int, who, epochs):
        """(threads, count) of unsigned integers of `size` bytes.

        Args:
            who: the number of each thread in the launch.
            epochs: how many barriers its block has passed.
        """
        places, all_bytes = self._places(addresses, size, count, "a load")
        self.accesses.read(all_bytes, who, epochs)
        return self._views[size][places]

    def store(self, addresses, values, who, epochs) -> None:
        """values (threads, count), unsigned; otherwise as `load`."""
        size, count = values.dtype.itemsize, values.shape[1]
        places, all_bytes = self._places(addresses, size, count, "a store")
        view = self._views[size]
        changes = np.repeat(view[places] != values, size, axis=1)
        self.accesses.write(all_bytes, who, epochs, changes)
        view[places] = values
        if (view[places] != values).any():
            raise Race("two threads write different values at once")

    def atomic(self, address: int, dtype: np.dtype, change: Callable):
        """One element, replaced by `change` of it; what was there."""
        places, _ = self._places(np.array([address]), dtype.itemsize, 1, "an atomic operation")
        view, at = self._views[dtype.itemsize], places[0, 0]
        before = view[at]
        view[at] = change(before)
        return before


class SharedMemory:
    """Of `blocks` blocks, `size` bytes each."""

    def __init__(self, blocks: int, size: int):
        self.size = -(-size // 1024) * 1024
        self.bytes = np.full((blocks, self.size), POISON, np.uint8)
        self._limit = size
        self._views = {each: self.bytes.reshape(-1).view(kind) for each, kind in UINTS.items()}

    def places(self, block, addresses, size: int, count: int = 1, what: str = "an access to shared memory"):
        """Indices of elements of `size` bytes, (threads, count)."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        whole = size * count
        if (offsets % whole != 0).any():
            raise MemoryFault(f"{what} of {whole} bytes is not aligned to them")
        if (offsets < 0).any() or (offsets + whole > self._limit).any():
            raise MemoryFault(f"{what} of {whole} bytes at {int(offsets.max())} is outside of {self._limit}")
        return ((block * self.size + offsets) // size)[:, None] + np.arange(count)

    def load(self, block, addresses, size: int, count: int):
        return self._views[size][self.places(block, addresses, size, count)]

    def store(self, block, addresses, values) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        self._views[size][self.places(block, addresses, size, count)] = values

    def atomic(self, block: int, address: int, dtype: np.dtype, change: Callable):
        """As of `GlobalMemory`."""
        at = self.places(block, np.array([address]), dtype.itemsize)[0, 0]
        view = self._views[dtype.itemsize]
        before = view[at]
        view[at] = change(before)
        return before
