"""What a launcher asks about the GPU, and how it sees arrays.

The answers come from Triton's driver, not from `torch.cuda`, so that a stand-in driver (see
`gpukernels.compile_report`) can give those of a GPU that is not here. Under Triton's interpreter
there is no driver: then the GPU is `INTERPRETED`, small, so that persistent kernels loop.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

#: True where `@triton.jit` made interpreted functions (TRITON_INTERPRET=1), which run on CPU tensors.
INTERPRETING = triton.knobs.runtime.interpret


class Gpu(NamedTuple):
    capability: int  # 90 for sm_90
    multiprocessors: int

    @property
    def takes_descriptors(self) -> bool:
        """Whether the kernels with tensor descriptors run here: where there is TMA, and 227 KiB for a block.

        From compute capability 12.0 on (consumer cards) there is TMA, but 99 KiB.
        """
        return 90 <= self.capability < 120


INTERPRETED = Gpu(capability=80, multiprocessors=3)


def gpu() -> Gpu:
    """The GPU that a launch now would run on."""
    return INTERPRETED if INTERPRETING else _gpu(driver.active.get_current_device())


@functools.cache
def _gpu(device: int) -> Gpu:
    active = driver.active
    properties = active.utils.get_device_properties(device)
    # A stand-in driver gives each capability a device number of its own, so the cache is right for it too.
    return Gpu(int(active.get_current_target().arch), properties["multiprocessor_count"])


_dependent = False


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """While this lasts, kernels that can do so start before the one in front of them on the stream has ended.

    Programmatic dependent launch, from compute capability 9.0 on: a kernel with the flag DEPENDENT loads what
    is constant (weights, biases, norm parameters), then waits for the kernel before it to end, and only then
    lets the next one start. So when a kernel starts, all have ended but the one before it, and attention may
    load the older keys and values of a cache early too. The caller promises that nothing launched meanwhile
    writes a weight, or a place of a cache that the very next kernel reads as old. Kernels without the flag
    start as ever. For a decode step; measured by a probe on an H100, 2026-11-22: 3555 tokens/s instead of 2843.
    """
    global _dependent
    before, _dependent = _dependent, True
    try:
        yield
    finally:
        _dependent = before


def dependent_launch() -> dict[str, Any]:
    """The launch options of a kernel with the flag DEPENDENT."""
    if _dependent and (INTERPRETING or gpu().capability >= 90):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Kernels may call `triton.cdiv` too, which makes it cost a launcher microseconds."""
    return -(-a // b)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (M, C) with neighbouring elements in a row: a view where the strides allow one."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
