"""Launches written down instead of run: a stand-in for Triton's driver."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpukernels.compile_report.binary import Compiled
from gpukernels.compile_report.chips import CHIPS, checked
from gpukernels.kernels.device import INTERPRETING
from gpukernels.library.registry import LAUNCHERS


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by the kernel's parameter names, constants included
    constants: tuple[str, ...]  # the names of those that the code was made for
    compiled: Compiled
    cooperative: bool = False  # refused unless all its programs are on the GPU at once


def record(function: Callable[[], Any], *, capability: int) -> list[Launch]:
    """Every launch that `function` makes on a GPU of this compute capability (a key of `CHIPS`), in order.

    Nothing runs: results are `meta` tensors. Gradients are recorded too where `function` asks for them.

    Raises:
        ValueError: a capability that is not in `CHIPS`.
        RuntimeError: Triton interprets its kernels in this process (TRITON_INTERPRET=1).
        triton.runtime.errors.OutOfResources: a kernel needs more shared memory than the GPU has.
    """
    with stand_in(capability) as launches, _CallLaunchers():
        function()
    return launches


@contextlib.contextmanager
def stand_in(capability: int) -> Iterator[list[Launch]]:
    """While this lasts, Triton believes in a GPU of this capability, and launches are only written down.

    Raises as `record` does.
    """
    checked("record", capability)
    if INTERPRETING:
        raise RuntimeError("record: kernels are interpreted in this process; start it without TRITON_INTERPRET")
    before, driver_here = driver._active, Driver(capability)
    driver.set_active(driver_here)
    try:
        yield driver_here.launches
    finally:
        driver.set_active(before)


class _CallLaunchers(TorchDispatchMode):
    """`meta` tensors would get to an op's fake implementation; here they get to its launcher."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gpukernels":
            return LAUNCHERS[op._schema.name.removeprefix("gpukernels::")](*args)
        return op(*args, **(kwargs or {}))


class Driver:
    """What `JITFunction.run` and `CompiledKernel` ask of a driver, and no more."""

    def __init__(self, capability: int):
        self._capability = capability
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        chip = CHIPS[self._capability]
        return {"max_shared_mem": chip.shared_memory, "multiprocessor_count": chip.multiprocessors, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared_memory: int, device: int):
        return cubin, cubin, 0, 0, 1024  # module, function, registers, spills, most threads of a block

    def launcher_cls(self, source, metadata) -> Callable:
        def launch(x, y, z, stream, cubin, packed_metadata, launch_metadata, enter, leave, *arguments):
            compiled = Compiled(cubin, metadata.target.arch, metadata.shared, metadata.num_warps, metadata.num_stages)
            current = driver.active  # a kernel compiled in an earlier recording has an earlier driver's launcher
            named = dict(zip(source.fn.arg_names, arguments, strict=True))
            constants = tuple(each.name for each in source.fn.params if each.is_constexpr)
            cooperative = metadata.launch_cooperative_grid
            current.launches.append(Launch(metadata.name, (x, y, z), named, constants, compiled, cooperative))

        return launch
