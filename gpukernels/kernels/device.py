"""What a launcher asks about the GPU, and how it sees arrays.

The answers come from Triton's driver, not from `torch.cuda`, so that a stand-in driver (see
`gpukernels.compile_report`) can give those of a GPU that is not here. Under Triton's interpreter
there is no driver: then the GPU is `INTERPRETED`, small, so that persistent kernels loop.
"""

import functools
import operator
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from gpukernels.launches import are_dependent

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

    @property
    def has_small_blocks(self) -> bool:
        """Whether a block may have 99 KiB of shared memory at most: compute capability 8.6, 8.9, and 12.0 on."""
        return self.capability in (86, 89) or self.capability >= 120


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


def dependent_launch(given: tuple = (), early: tuple = ()) -> dict[str, Any]:
    """The launch options of a kernel with the flag DEPENDENT: see `gpukernels.launches`.

    Where one of the arrays was copied right in front, for its strides or by autocast, the launch is not dependent:
    a kernel may start when the programs in front of it have ended, and see what they wrote only behind its wait.

    Args:
        given: the arrays that the kernel loads before it waits, as the caller gave them.
        early: the same as the kernel gets them.
    """
    if (
        are_dependent()
        and (INTERPRETING or gpu().capability >= 90)
        and all(map(operator.is_, given, early))
        and not torch.is_autocast_enabled("cuda")
    ):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Kernels may call `triton.cdiv` too, which makes it cost a launcher microseconds."""
    return -(-a // b)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (M, C) with neighbouring elements in a row: a view where the strides allow one."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
