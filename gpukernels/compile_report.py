"""What kernels compile to, for any NVIDIA GPU, without one.

`record` runs a function under a stand-in for Triton's driver: every launch goes through the real
launcher, is specialised and compiled as it would be on that GPU, and is written down instead of run.
The function gets tensors on torch's `meta` device, which have shapes and no memory.

    launches = record(lambda: gpukernels.layer_norm(x, weight), capability=90)
    for launch in launches:
        print(launch.kernel, launch.grid, launch.compiled.registers, launch.compiled.spilled_bytes)
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpukernels.kernels.device import INTERPRETING
from gpukernels.library.registry import LAUNCHERS


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


class Compiled(NamedTuple):
    """One kernel's machine code, and what it needs."""

    cubin: bytes
    shared_memory: int  # bytes a block
    num_warps: int
    num_stages: int

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return _resources(self.cubin)["REG"]

    @property
    def spilled_bytes(self) -> int:
        """Stack of a thread: what ptxas could not keep in registers."""
        return _resources(self.cubin)["STACK"]

    @property
    def listing(self) -> tuple[str, ...]:
        """The SASS instructions in their order, by full name ("HGMMA.64x128x16.F32")."""
        return _listing(self.cubin)

    @property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return Counter(self.listing)

    def count(self, *names: str) -> int:
        """How many instructions start with one of `names`."""
        return sum(times for name, times in self.instructions.items() if name.startswith(names))

    @property
    def tensor_core_instructions(self) -> int:
        """mma (HMMA, IMMA, QMMA), wgmma (HGMMA, ...) and tcgen05 (UTCHMMA, ...), all data types."""
        return self.count("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTC", "OMMA")


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by the kernel's parameter names, constants included
    compiled: Compiled


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
    if capability not in CHIPS:
        raise ValueError(f"record: capability must be one of {', '.join(map(str, CHIPS))}, got {capability}")
    if INTERPRETING:
        raise RuntimeError("record: kernels are interpreted in this process; start it without TRITON_INTERPRET")
    before, driver_here = driver._active, _Driver(capability)
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


class _Driver:
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
            compiled = Compiled(cubin, metadata.shared, metadata.num_warps, metadata.num_stages)
            current = driver.active  # a kernel compiled in an earlier recording has an earlier driver's launcher
            named = dict(zip(source.fn.arg_names, arguments, strict=True))
            current.launches.append(Launch(metadata.name, (x, y, z), named, compiled))

        return launch


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the CUDA tools in Triton's wheel says about a cubin."""
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


@functools.lru_cache(maxsize=1024)
def _resources(cubin: bytes) -> dict[str, int]:
    usage = _tool("cuobjdump", cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}


@functools.lru_cache(maxsize=1024)
def _listing(cubin: bytes) -> tuple[str, ...]:
    # "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    code = _tool("nvdisasm", cubin, "-c")
    return tuple(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))
