"""A kernel's machine code: what it needs, and its instructions."""

import re
from collections import Counter
from typing import NamedTuple

from gpukernels.compile_report.disassembly import Facts, read

#: mma (HMMA, IMMA, ...), wgmma (HGMMA, ...) and tcgen05 (UTCHMMA, ...), all data types.
TENSOR_CORES = re.compile(r"(HMMA|IMMA|QMMA|DMMA|OMMA|[HIQ]GMMA|UTC[HIQO]MMA)\b")
_LOADS, _STORES = ("LDG", "LDGSTS", "UTMALDG"), ("STG", "UTMASTG")


class Compiled(NamedTuple):
    """One kernel's machine code, and what it needs."""

    cubin: bytes
    capability: int  # of the GPU that it is for
    shared_memory: int  # bytes a block
    num_warps: int
    num_stages: int
    function: str | None = None  # of several in the cubin; Triton's has one

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._facts["REG"]

    @property
    def spilled_bytes(self) -> int:
        """Stack of a thread: what ptxas could not keep in registers."""
        return self._facts["STACK"]

    @property
    def static_shared_memory(self) -> int:
        """Bytes that the code declares; from sm_90 on with the KiB that CUDA keeps of each block, if any."""
        return self._facts["SHARED"]

    @property
    def listing(self) -> list[str]:
        """The SASS instructions in their order, by full name ("HGMMA.64x128x16.F32")."""
        return self._facts["listing"]

    @property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return Counter(self.listing)

    @property
    def loops(self) -> list[list[str]]:
        """The instructions of each loop that has no other inside."""
        ends = [(first, last) for first, last in self._facts["loops"]]
        inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
        return [self.listing[first : last + 1] for first, last in inner]

    def count(self, *names: str) -> int:
        """How many instructions start with one of `names`."""
        return sum(times for name, times in self.instructions.items() if name.startswith(names))

    @property
    def tensor_core_instructions(self) -> int:
        return sum(self.tensor_cores.values())

    @property
    def tensor_cores(self) -> dict[str, int]:
        """The instructions of tensor cores by kind and shape: {"HGMMA.64x128x16": 8}."""
        found: Counter[str] = Counter()
        for name, times in self.instructions.items():
            if TENSOR_CORES.match(name):
                found[".".join(name.split(".")[:2])] += times
        return dict(found)

    @property
    def loads(self) -> dict[str, int]:
        """Loads from global memory by width: {"16": 4, "tma": 2}, bytes of a thread, or whole tiles by TMA."""
        return widths(self.listing, _LOADS)

    @property
    def stores(self) -> dict[str, int]:
        """Stores to global memory, as `loads`."""
        return widths(self.listing, _STORES)

    @property
    def _facts(self) -> Facts:
        functions = read(self.cubin, self.capability)
        return functions[self.function] if self.function is not None else next(iter(functions.values()))


def widths(listing: list[str], names: tuple[str, ...] = _LOADS + _STORES) -> dict[str, int]:
    """How many of these accesses to global memory have each width, the widest first."""
    found: Counter[str] = Counter()
    for name in listing:
        kind, *parts = name.split(".")
        if kind in names:
            # "LDG.E.EF.128", "LDG.E.U16", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E" of four bytes
            bits = [part for part in parts if re.fullmatch(r"(U|S)?(8|16)|64|128|256", part)]
            found["tma" if kind.startswith("U") else str(int(bits[-1].lstrip("US")) // 8 if bits else 4)] += 1
    return dict(sorted(found.items(), key=lambda item: -1000 if item[0] == "tma" else -int(item[0])))
