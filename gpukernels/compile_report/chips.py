"""The GPUs that kernels are compiled for."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A GPU of one compute capability, as the stand-in driver describes it."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes that one block may have


#: By compute capability: NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications".
CHIPS = {
    80: Chip("A100", 108, 163 << 10),
    89: Chip("RTX 4090", 128, 99 << 10),
    90: Chip("H100", 132, 227 << 10),
    100: Chip("B200", 148, 227 << 10),
}

#: Bytes of shared memory that CUDA keeps for itself of every block, from compute capability 8.0 on.
RESERVED = 1 << 10


def checked(who: str, capability: int) -> int:
    """The capability, if it is one of `CHIPS`."""
    if capability not in CHIPS:
        raise ValueError(f"{who}: capability must be one of {', '.join(map(str, CHIPS))}, got {capability}")
    return capability
