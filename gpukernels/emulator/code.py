"""PTX made into Python: each basic block becomes a function over arrays of registers.

There are two of each: for all threads, and for some, whose registers alone change.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpukernels.emulator import arithmetic, copies, tensor_cores, traffic, values
from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.order import ranks
from gpukernels.emulator.ptx import BARRIERS, Instruction, Kernel
from gpukernels.emulator.writer import Symbols, Writer

#: What orders memory, hints, or matters to programs that run side by side: here all is in order.
_NOTHING = (
    "fence", "membar", "griddepcontrol", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "prefetch", "bar.warp.sync", "nanosleep",
    "mbarrier.inval",
)  # fmt: skip
_WRITERS = {
    "ld": traffic.load, "st": traffic.store, "cp": traffic.copy, "mbarrier": traffic.barrier,
    "mma": traffic.tensor_core, "wgmma": traffic.tensor_core, "ldmatrix": traffic.tensor_core,
    "stmatrix": traffic.tensor_core, "shfl": traffic.lanes, "redux": traffic.lanes, "elect": traffic.lanes,
    "atom": traffic.atomic, "red": traffic.atomic,
    "mov": arithmetic.move, "cvta": arithmetic.move, "setp": arithmetic.compare, "cvt": arithmetic.convert,
    "createpolicy": lambda w: w.assign(w.operands[0], "np.uint64(0)", "b64"),
}  # fmt: skip
_DTYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.uint32, "f64": np.uint64}


class Code:
    """A kernel's blocks as functions, made when they are first run."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._constants = {name: np.frombuffer(data, np.uint8).copy() for name, data in kernel.constants.items()}
        self._symbols = Symbols(kernel, self._constants)
        self._names: dict[str, Any] = {
            "np": np, "v": values, "t": tensor_cores, "c": copies, "where": np.where, "bits": values.bits,
        }  # fmt: skip
        self._functions: dict[tuple[int, bool], Callable] = {}
        self._sources: dict[tuple[int, bool], list[Instruction]] = {}
        instructions = [each for block in kernel.blocks for each in block]
        self.has_atomics = any(each.parts[0] in ("atom", "red") for each in instructions)
        #: In which order blocks take turns where threads have branched apart.
        self.ranks = np.array(ranks([kernel.successors(block) for block in range(len(kernel.blocks))]))

    @property
    def local_bytes(self) -> int:
        """Local memory of a thread."""
        return self._symbols.local_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block that the code declares."""
        return self._symbols.shared_bytes

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Addresses and sizes of the arrays that the code brings with it."""
        return [(each.ctypes.data, each.nbytes) for each in self._constants.values()]

    def registers(self, count: int) -> list[np.ndarray]:
        """Of so many threads: all bits set, NaN, until something is written."""
        poison = {kind: np.full(count, 0 if dtype is np.bool_ else np.iinfo(dtype).max, dtype)
                  for kind, dtype in _DTYPES.items()}  # fmt: skip
        return [poison[kind] for kind in self.kernel.registers.values()]

    def run(self, block: int, machine: Any, mask: np.ndarray | None) -> tuple[str, int, np.ndarray | None]:
        """A block, for the threads in `mask` (None: all).

        Returns what comes then: "jump" to a block, for the threads of a guard (None: all that ran), "exit" of those,
        or "barrier". Who does not jump or leave goes on with the next block.
        """
        key = (block, mask is not None)
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._compile(*key)
        try:
            return function(machine, machine.registers, mask)
        except RuntimeError as fault:
            raise self._located(fault, key) from None

    def _located(self, fault: RuntimeError, key: tuple[int, bool]) -> RuntimeError:
        """The same, with the instruction that ran."""
        at = self._sources[key][fault.__traceback__.tb_next.tb_lineno - 2]
        return type(fault)(f"{self.kernel.name}, {at.source}: {fault} ({at.name}, line {at.line} of the PTX)")

    def _compile(self, block: int, masked: bool) -> Callable:
        lines = ["def block(m, R, M):"]
        sources: list[Instruction] = []
        end = f"return 'jump', {block + 1}, {'M' if masked else None}"
        for each in self.kernel.blocks[block]:
            writer = Writer(self._symbols, self._constant, each, masked)
            if each.parts[0] == "bra":
                end = f"return 'jump', {self.kernel.labels[each.operands[0]]}, {writer.mask}"
            elif each.parts[0] in ("ret", "exit"):
                end = f"return 'exit', 0, {writer.mask}"
            elif each.name.startswith(BARRIERS):
                end = "return 'barrier', 0, None"
            elif not each.name.startswith(_NOTHING):
                self._write(writer, each)
            lines += [f" {line}" for line in writer.lines]
            sources += [each] * len(writer.lines)
        self._sources[block, masked] = sources
        scope: dict[str, Any] = {}
        exec(compile("\n".join([*lines, f" {end}"]), f"{self.kernel.name}.{block}", "exec"), self._names, scope)
        return scope["block"]

    def _write(self, writer: Writer, instruction: Instruction) -> None:
        try:
            _WRITERS.get(instruction.parts[0], arithmetic.compute)(writer)
        except Unsupported as fault:
            text = f"{instruction.name} {', '.join(instruction.operands)}"
            raise Unsupported(f"{self.kernel.name}, line {instruction.line} of the PTX: {text}: {fault}") from None

    def _constant(self, value: Any) -> str:
        name = f"K{len(self._names)}"
        self._names[name] = value
        return name
