"""A kernel's machine code: what it needs, and its instructions."""

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.runtime.cache import get_cache_manager

#: mma (HMMA, IMMA, ...), wgmma (HGMMA, ...) and tcgen05 (UTCHMMA, ...), all data types.
TENSOR_CORES = re.compile(r"(HMMA|IMMA|QMMA|DMMA|OMMA|[HIQ]GMMA|UTC[HIQO]MMA)\b")
_LOADS, _STORES = ("LDG", "LDGSTS", "UTMALDG"), ("STG", "UTMASTG")


class Compiled(NamedTuple):
    """One kernel's machine code, and what it needs."""

    cubin: bytes
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
    def _facts(self) -> dict[str, Any]:
        functions = _read(self.cubin)
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


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the CUDA tools in Triton's wheel says about a cubin."""
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


@functools.lru_cache(maxsize=1024)
def _read(cubin: bytes) -> dict[str, dict[str, Any]]:
    """By function: REG, STACK, SHARED, listing, and loops as their first and last places in it.

    What has been read stands in Triton's cache, as taking it apart costs as much as compiling a small kernel.
    """
    name = "instructions-1.json"
    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    stored = cache.get_file(name)
    if stored is not None:
        return json.loads(Path(stored).read_text(encoding="utf-8"))
    resources = _parts(_tool("cuobjdump", cubin, "--dump-resource-usage"), r"^ Function (.*):$")
    code = _parts(_tool("nvdisasm", cubin, "-c"), r"^//-+ \.text\.(\S+) +-+$")
    # "  REG:10 STACK:0 SHARED:0 LOCAL:0 ..."
    found = {
        function: {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
        | dict(zip(("listing", "loops"), _instructions(code[function]), strict=True))
        for function, text in resources.items()
    }
    cache.put(json.dumps(found), name, binary=False)
    return found


def _instructions(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The names, and where backward branches lead from and to."""
    listing, loops, labels = [], [], {}
    for line in code.splitlines():
        # ".L_x_3:" or "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(listing)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            target = re.search(r"`\((\.L_\w+)\)", line) if found[1].startswith("BRA") else None
            if target and target[1] in labels and labels[target[1]] < len(listing):
                loops.append((labels[target[1]], len(listing)))
            listing.append(found[1])
    return listing, loops


def _parts(text: str, heading: str) -> dict[str, str]:
    """What stands below each heading, by the name in it."""
    _, *parts = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))
