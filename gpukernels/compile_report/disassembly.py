"""Machine code taken apart by NVIDIA's tools, which come with Triton."""

import functools
import hashlib
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

_WIDTH = 16  # bytes of an instruction, from sm_70 on
_FILE = "instructions-2.json"

#: What is known of a function: REG, STACK and SHARED; its listing; its loops, as first and last places in that.
Facts = dict[str, Any]


def read_together(cubins: Iterable[bytes], capability: int) -> None:
    """Takes many apart at once: the tool needs 0.2 s to start, and next to nothing for each of them."""
    _take_apart([cubin for cubin in dict.fromkeys(cubins) if _stored(cubin) is None], capability)


@functools.lru_cache(maxsize=1024)
def read(cubin: bytes, capability: int) -> dict[str, Facts]:
    """By function. What has been taken apart stands in Triton's cache."""
    read_together([cubin], capability)
    return json.loads(Path(_stored(cubin)).read_text(encoding="utf-8"))


def _cache(cubin: bytes):
    return get_cache_manager(hashlib.sha256(cubin).hexdigest())


def _stored(cubin: bytes) -> str | None:
    return _cache(cubin).get_file(_FILE)


def _take_apart(cubins: list[bytes], capability: int) -> None:
    if not cubins:
        return
    found = {cubin: _resources(cubin) for cubin in cubins}
    parts = [(cubin, function, code) for cubin in cubins for function, code in _functions(cubin)]
    # Without the files around it, all their code is one text.
    listed = _tool("nvdisasm", b"".join(code for *_, code in parts), "--binary", _chip(capability))
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?) *;", listed, flags=re.MULTILINE)
    first = 0
    for cubin, function, code in parts:
        last = first + len(code) // _WIDTH
        found[cubin][function] |= listing(instructions[first:last], first)
        first = last
    if first != len(instructions):
        raise RuntimeError(f"nvdisasm lists {len(instructions)} instructions of {first}")
    for cubin, functions in found.items():
        _cache(cubin).put(json.dumps(functions), _FILE, binary=False)


def _chip(capability: int) -> str:
    """As the tool calls it; with the instructions that are for this chip alone, where it has any."""
    return f"SM{capability}a" if capability >= 90 else f"SM{capability}"


def _resources(cubin: bytes) -> dict[str, Facts]:
    text = _tool("cuobjdump", cubin, "--dump-resource-usage")
    # " Function f:", and below it "  REG:10 STACK:0 SHARED:0 LOCAL:0 ..."
    _, *parts = re.split(r"^ Function (.*):$", text, flags=re.MULTILINE)
    return {
        function: {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", facts)}
        for function, facts in zip(parts[::2], parts[1::2], strict=True)
    }


def _functions(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Each function's name and code: the sections ".text.NAME" of an ELF file (its tables: `man 5 elf`)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    for name, *_, offset, length in sections:
        start = strings + name
        full = cubin[start : cubin.index(b"\0", start)].decode()
        if full.startswith(".text."):
            yield full.removeprefix(".text."), cubin[offset : offset + length]


def listing(instructions: list[str], first: int = 0) -> Facts:
    """The names, and where backward branches lead from and to; first: the place of the first one in the text."""
    names, loops = [], []
    for here, text in enumerate(instructions):
        # "LDC R1, c[0x0][0x28]" or "@!P0 BRA 0x14a0"
        name = re.match(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)[1]
        target = re.search(r"\b0x([0-9a-f]+)$", text) if name.startswith("BRA") else None
        if target and 0 <= (to := int(target[1], 16) // _WIDTH - first) < here:
            loops.append((to, here))
        names.append(name)
    return {"listing": names, "loops": loops}


def _tool(name: str, code: bytes, *options: str) -> str:
    """What one of the CUDA tools in Triton's wheel says about a file."""
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(code)
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout
