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
    function: str | None = None  # of several in the cubin; Triton's has one

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return _resources(self.cubin, self.function)["REG"]

    @property
    def spilled_bytes(self) -> int:
        """Stack of a thread: what ptxas could not keep in registers."""
        return _resources(self.cubin, self.function)["STACK"]

    @property
    def static_shared_memory(self) -> int:
        """Bytes that the code declares; from sm_90 on with the KiB that CUDA keeps of each block, if any."""
        return _resources(self.cubin, self.function)["SHARED"]

    @property
    def listing(self) -> tuple[str, ...]:
        """The SASS instructions in their order, by full name ("HGMMA.64x128x16.F32")."""
        return _listing(self.cubin, self.function)

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
def _resources(cubin: bytes, function: str | None) -> dict[str, int]:
    """ " Function add:\n  REG:10 STACK:0 SHARED:0 LOCAL:0 ..." of each."""
    usage = _part(_tool("cuobjdump", cubin, "--dump-resource-usage"), r"^ Function (.*):$", function)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}


@functools.lru_cache(maxsize=1024)
def _listing(cubin: bytes, function: str | None) -> tuple[str, ...]:
    # "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    code = _part(_tool("nvdisasm", cubin, "-c"), r"^//-+ \.text\.(\S+) +-+$", function)
    return tuple(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))


def _part(text: str, heading: str, function: str | None) -> str:
    """What stands below a function's heading, or the whole."""
    if function is None:
        return text
    _, *parts = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))[function]
