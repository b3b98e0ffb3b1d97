"""The tensor memory accelerator: tiles between global and shared memory, and the barriers that say they have come.

Source: PTX ISA 8.7, "Tensor copies" and "mbarrier"; CUDA Driver API, cuTensorMapEncodeTiled.
"""

from typing import NamedTuple

import numpy as np

from gpukernels.emulator.barrier import Barrier
from gpukernels.emulator.faults import MemoryFault
from gpukernels.emulator.memory import SHARED_BASE, UINTS
from gpukernels.emulator.tensor_cores import swizzled
from gpukernels.emulator.writer import PARAMETER_BASE, PARAMETER_STEP


class Descriptor(NamedTuple):
    """A tensor of which tiles are copied; dimensions with the innermost last, as Triton gives them."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    box: tuple[int, ...]
    size: int  # bytes of an element
    swizzle: int  # 0 none, 1: 32 bytes, 2: 64, 3: 128

    def check(self) -> None:
        """What the driver refuses to encode.

        Raises:
            MemoryFault: it would.
        """
        if self.address % 16:
            raise MemoryFault("a tensor descriptor's address is not aligned to 16 bytes")
        if self.strides[-1] != 1 or any(each * self.size % 16 or each <= 0 for each in self.strides[:-1]):
            raise MemoryFault(
                f"a tensor descriptor's strides {self.strides} of {self.size} bytes are not multiples of 16"
            )
        if any(not 0 < each <= 2**32 for each in self.shape) or any(not 0 < each <= 256 for each in self.box):
            raise MemoryFault(f"a tensor descriptor's shape {self.shape} or box {self.box} is not possible")
        inner = self.box[-1] * self.size
        if inner % 16 or (self.swizzle and inner > 16 << self.swizzle):
            raise MemoryFault(f"a tensor descriptor's box is {inner} bytes wide")


def _each(machine, mask):
    return range(machine.count) if mask is None else np.flatnonzero(mask)


def _descriptor(machine, address: int) -> Descriptor:
    found = machine.parameters[(int(address) - PARAMETER_BASE) // PARAMETER_STEP]
    assert isinstance(found, Descriptor)
    return found


def _tile(machine, thread: int, address: int, starts, target: int):
    """Where a tile's elements lie in shared memory; which of them are in the tensor, and where."""
    one = _descriptor(machine, address)
    starts = [int(each[thread]) for each in reversed(starts)]  # PTX gives the innermost first
    grid = np.meshgrid(*(np.arange(count) for count in one.box), indexing="ij")
    inside = np.ones(one.box, bool)
    source = np.zeros(one.box, np.int64)
    for axis, start, extent, stride in zip(grid, starts, one.shape, one.strides, strict=True):
        inside &= (start + axis >= 0) & (start + axis < extent)
        source += (start + axis) * stride
    if target % 128:
        raise MemoryFault("a tile in shared memory is not aligned to 128 bytes")
    at = target + np.arange(source.size) * one.size
    if one.swizzle:
        at = swizzled(at, 16 << one.swizzle)
    return one, at, inside.reshape(-1), source.reshape(-1)


def _as_one(machine, thread: int, count: int):
    """A tile's bytes are touched by the thread that asked for it."""
    return np.full(count, machine.who[thread]), np.full(count, machine.epochs[thread])


def load_tile(machine, mask, addresses, starts, targets, barriers) -> None:
    for i in _each(machine, mask):
        one, at, inside, source = _tile(machine, i, addresses[i], starts, int(targets[i]))
        data = np.zeros((len(at), 1), UINTS[one.size])
        places = one.address + source[inside] * one.size
        data[inside] = machine.memory.load(places, one.size, 1, *_as_one(machine, i, len(places)))
        machine.shared.store(np.full(len(at), machine.block[i]), at, data)
        machine.barriers[int(machine.block[i]), int(barriers[i])].come(len(at) * one.size)


def store_tile(machine, mask, addresses, starts, targets) -> None:
    for i in _each(machine, mask):
        one, at, inside, source = _tile(machine, i, addresses[i], starts, int(targets[i]))
        data = machine.shared.load(np.full(len(at), machine.block[i]), at, one.size, 1)
        places = one.address + source[inside] * one.size
        machine.memory.store(places, data[inside], *_as_one(machine, i, len(places)))


def start(machine, mask, addresses, count: int) -> None:
    for i in _each(machine, mask):
        if addresses[i] % 8 or addresses[i] < SHARED_BASE:
            raise MemoryFault("an mbarrier is not aligned to 8 bytes")
        machine.barriers[int(machine.block[i]), int(addresses[i])] = Barrier(count)


def arrive(machine, mask, addresses, expected) -> None:
    for i in _each(machine, mask):
        machine.barriers[int(machine.block[i]), int(addresses[i])].arrive(int(expected[i]))


def ended(machine, mask, addresses, parity) -> np.ndarray:
    """Whether the phase of this parity is over."""
    found = np.zeros(machine.count, bool)
    known: dict[tuple[int, int], int] = {}
    for i in _each(machine, mask):
        key = int(machine.block[i]), int(addresses[i])
        if key not in known:
            known[key] = machine.barriers[key].phase
        found[i] = known[key] % 2 != int(parity[i]) & 1
    return found
