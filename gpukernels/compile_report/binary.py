"""A kernel's machine code: what it needs, and its instructions."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton


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
