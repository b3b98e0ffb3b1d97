"""A stand-in for Triton's driver that runs what was compiled: PTX, on tensors of the CPU."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukernels.compile_report.recording import Driver
from gpukernels.emulator.code import Code
from gpukernels.emulator.copies import Descriptor
from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.machine import Machine
from gpukernels.emulator.memory import GlobalMemory
from gpukernels.emulator.ptx import parse

# What runs in step at a time, at most: threads, so that their registers stay in a cache, and bytes of shared memory.
_THREADS, _SHARED = 4096, 64 << 20


class EmulatingDriver(Driver):
    """Launches run at once, program by program, in batches."""

    def __init__(self, capability: int, seed: int | None, multiprocessors: int | None):
        super().__init__(capability)
        self._multiprocessors = multiprocessors
        self._number = 2000 + capability + 1000 * (multiprocessors or 0)
        self._seed = seed
        self.ran: dict[str, int] = {}  # launches by kernel

    def get_current_device(self) -> int:
        return self._number  # Triton keeps compiled kernels by device: those of a recording are not for running

    def get_device_properties(self, device: int) -> dict[str, int]:
        known = super().get_device_properties(device)
        return known if self._multiprocessors is None else known | {"multiprocessor_count": self._multiprocessors}

    def launcher_cls(self, source, metadata) -> Callable:
        text = Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")).read_text(encoding="utf-8")
        code = _code(text)

        def launch(x, y, z, stream, cubin, packed_metadata, launch_metadata, enter, leave, *arguments):
            current = driver.active  # a kernel compiled in an earlier emulation has an earlier driver's launcher
            _run(code, (x, y, z), source, metadata, arguments, current._seed)
            current.ran[metadata.name] = current.ran.get(metadata.name, 0) + 1

        return launch


@functools.lru_cache(maxsize=256)
def _code(text: str) -> Code:
    return Code(parse(text))


def _run(code: Code, grid: tuple[int, int, int], source, metadata, arguments, seed: int | None) -> None:
    given = dict(zip(source.fn.arg_names, arguments, strict=True))
    execute(
        code, grid, metadata.num_warps * 32, list(_parameters(source.signature, given, metadata)),
        _ranges(given.values()), shared=metadata.shared, seed=seed, together=metadata.launch_cooperative_grid,
    )  # fmt: skip


def execute(
    code: Code,
    grid: tuple[int, int, int],
    threads: int,
    parameters: list,
    ranges: Iterable[tuple[int, int]],
    *,
    shared: int = 0,
    seed: int | None = None,
    together: bool = False,
) -> None:
    """One launch of a kernel.

    Args:
        grid: programs in x, y and z.
        threads: of a program, whole warps.
        parameters: unsigned integers of NumPy by the bits of each, and `Descriptor`s; those that are missing are 0.
        ranges: addresses and sizes of what it may touch.
        shared: bytes of shared memory that the launch gives each program, in place of what the code declares.
        seed: as in `emulated`.
        together: whether programs wait for one another, so that all must run at once.

    Raises:
        MemoryFault, Race: as `emulated` does.
    """
    programs, shared = grid[0] * grid[1] * grid[2], shared or code.shared_bytes
    kinds = [kind for _, kind in code.kernel.parameters[len(parameters) :]]
    parameters = parameters + [np.uint64(0) if kind.endswith("64") else np.uint32(0) for kind in kinds]
    memory = GlobalMemory([*ranges, *code.ranges], threads)
    memory.accesses.between_blocks = not code.has_atomics
    batch = programs if together else max(1, min(_THREADS // threads, _SHARED // max(1, shared)))
    with np.errstate(all="ignore"):  # infinities and NaN are as good as other numbers
        for first in range(0, programs, batch):
            machine = Machine(
                threads, range(first, min(programs, first + batch)), grid, parameters, memory, shared=shared,
                local=code.local_bytes, seed=seed,
            )  # fmt: skip
            machine.registers = code.registers(machine.count)
            machine.run(code)


def _parameters(signature: dict, given: dict, metadata) -> Iterator:
    """What the compiled kernel is called with: see `make_launcher` of Triton's driver for CUDA."""
    described = iter(metadata.tensordesc_meta or ())
    for name, kind in signature.items():
        value = given[name]
        if kind == "constexpr":
            continue
        if isinstance(kind, tuple):
            raise Unsupported(f"{metadata.name}: the argument {name} is a tuple")
        if kind.startswith("tensordesc"):
            meta = next(described)
            one = Descriptor(
                value.base.data_ptr(), tuple(value.shape), tuple(value.strides), tuple(meta["block_size"]),
                value.base.element_size(), meta["swizzle"],
            )  # fmt: skip
            one.check()
            yield one
            yield from (np.uint32(each) for each in value.shape)
            yield from (np.uint64(each) for each in value.strides)
        elif kind[0] == "*":
            yield np.uint64(value.data_ptr())
        elif kind == "fp32":
            yield np.float32(value).view(np.uint32)
        elif kind in ("i64", "u64"):
            yield np.uint64(int(value) % 2**64)
        else:
            yield np.uint32(int(value) % 2**32)


def _ranges(values) -> Iterator[tuple[int, int]]:
    for each in values:
        if isinstance(each, TensorDescriptor):
            each = each.base
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
