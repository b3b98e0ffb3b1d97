"""The GPUs that kernels are compiled for, and how many blocks of a kernel one multiprocessor holds."""

from typing import NamedTuple

_REGISTERS = 65536  # of a multiprocessor, 32 bits each
_REGISTERS_AT_A_TIME = 256  # a warp gets them in units of
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers and of the warps
_SHARED_AT_A_TIME = 128  # bytes

#: Bytes of shared memory that CUDA keeps for itself of every block, from compute capability 8.0 on.
RESERVED = 1 << 10


class Chip(NamedTuple):
    """A GPU of one compute capability, as the stand-in driver describes it."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes that one block may have
    resident_shared_memory: int  # bytes that all blocks of a multiprocessor may have
    resident_warps: int  # of a multiprocessor
    resident_blocks: int


#: By compute capability: NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications".
CHIPS = {
    80: Chip("A100", 108, 163 << 10, 164 << 10, 64, 32),
    89: Chip("RTX 4090", 128, 99 << 10, 100 << 10, 48, 24),
    90: Chip("H100", 132, 227 << 10, 228 << 10, 64, 32),
    100: Chip("B200", 148, 227 << 10, 228 << 10, 64, 32),
}


class Occupancy(NamedTuple):
    """What of a kernel one multiprocessor holds at a time."""

    blocks: int
    warps: int
    limit: str  # what there is no more of: "registers", "shared memory", "warps" or "blocks"


def occupancy(chip: Chip, *, registers: int, shared_memory: int, num_warps: int) -> Occupancy:
    """How many blocks stay on a multiprocessor together.

    Args:
        registers: of a thread.
        shared_memory: bytes of a block, without what CUDA keeps.
        num_warps: of a block.

    Source: how registers and shared memory are handed out is in the CUDA C++ Best Practices Guide, "Calculating
    Occupancy", and in the toolkit's `cuda_occupancy.h`.
    """
    a_warp = _up(max(registers, 1) * 32, _REGISTERS_AT_A_TIME)
    by = {
        "registers": _REGISTERS // _PARTITIONS // a_warp * _PARTITIONS // num_warps,
        "shared memory": chip.resident_shared_memory // _up(shared_memory + RESERVED, _SHARED_AT_A_TIME),
        "warps": chip.resident_warps // num_warps,
        "blocks": chip.resident_blocks,
    }
    limit = min(by, key=by.__getitem__)
    return Occupancy(by[limit], by[limit] * num_warps, limit)


def checked(who: str, capability: int) -> int:
    """The capability, if it is one of `CHIPS`."""
    if capability not in CHIPS:
        raise ValueError(f"{who}: capability must be one of {', '.join(map(str, CHIPS))}, got {capability}")
    return capability


def _up(value: int, unit: int) -> int:
    """`value`, or the next multiple of `unit`."""
    return -(-value // unit) * unit
