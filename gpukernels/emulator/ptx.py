"""PTX text, taken apart: a kernel's parameters, registers, shared memory, and basic blocks of instructions.

The syntax is that of the PTX ISA 8.7, as far as LLVM and NVRTC write it.
"""

import re
from typing import NamedTuple

#: A block's threads wait for one another: the end of a basic block.
BARRIERS = ("bar.sync", "barrier.sync")


class Instruction(NamedTuple):
    """`@guard name operands;`, with the line of the text."""

    name: str  # "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: str | None  # "%p1", "!%p1", or None
    line: int  # of the PTX
    source: str  # "norm.py:81": where the kernel's author wrote it

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


#: Instructions that are entered at the first and left at the last.
Block = tuple[Instruction, ...]


class Kernel(NamedTuple):
    name: str
    target: str  # "sm_90a"
    parameters: tuple[tuple[str, str], ...]  # name and type: ("..._param_0", "u64"), or "b8[128]" of a descriptor
    registers: dict[str, str]  # "%r1": "b32"
    local: dict[str, int]  # bytes a thread, by symbol
    shared: dict[str, int]  # bytes a block, of what the code declares
    constants: dict[str, bytes]  # of global arrays with a value
    blocks: tuple[Block, ...]
    labels: dict[str, int]  # the block behind each label

    def successors(self, block: int) -> list[int]:
        """The blocks that may run next."""
        last = self.blocks[block][-1:]
        if last and last[0].parts[0] in ("ret", "exit") and last[0].guard is None:
            return []
        behind = []
        if last and last[0].parts[0] == "bra":
            behind.append(self.labels[last[0].operands[0]])
            if last[0].guard is None:
                return behind
        return behind + ([block + 1] if block + 1 < len(self.blocks) else [])


def parse(text: str, entry: str | None = None) -> Kernel:
    """A kernel of a PTX module; without `entry`, its name, the only one.

    Raises:
        ValueError: a line that is not understood.
    """
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)[1]
    constants = {
        name: bytes(int(value) for value in values.split(","))
        for name, values in re.findall(r"^\.global .*?\.b8 (\S+)\[\d+\] = \{([^}]*)\};", text, re.MULTILINE)
    }
    shared = {each: int(size) for each, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", text)}
    head = re.search(rf"\.visible \.entry ({re.escape(entry) if entry else '[^(]+'})\(([^)]*)\)", text)
    parameters = tuple(_parameter(line) for line in head[2].split("\n") if ".param" in line)
    start = text.index("{", head.end())
    first_line = text.count("\n", 0, start) + 1
    body = text[start : _end(text, start)]

    registers: dict[str, str] = {}
    local: dict[str, int] = {}
    statements: list[Instruction | str] = []
    scopes: list[_Scope] = []  # of names declared between inner braces: each gets one of its own
    opened = 0
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(?:.*/)?([^"/]+)"', text, re.MULTILINE))
    source = ""
    for number, line in _statements(body, first_line):
        if found := re.match(r"\.loc\s+(\d+) (\d+)", line):
            source = f"{files.get(found[1], '')}:{found[2]}"
        elif line == "{":
            scopes.append(_Scope(opened))
            opened += 1
        elif line == "}":
            scopes.pop()
        elif found := re.fullmatch(r"\.reg \.(\w+)\s+(.*)", line):
            for each in found[2].split(","):
                name = each.strip()
                if many := re.fullmatch(r"(%\w+)<(\d+)>", name):
                    registers |= {f"{many[1]}{i}": found[1] for i in range(int(many[2]))}
                else:
                    scopes[-1][name] = scopes[-1].own(name)
                    registers[scopes[-1][name]] = found[1]
        elif found := re.fullmatch(r"\.local .*\.b8\s+(\w+)\[(\d+)\]", line):
            local[found[1]] = int(found[2])
        elif line.startswith("."):  # what is said of shared memory has been read
            continue
        elif found := re.fullmatch(r"([\w$.]+):", line):
            statements.append(scopes[-1].own(found[1]))
        else:
            statements.append(_instruction(line, number, source, scopes))
    blocks, labels = _blocks(statements)
    return Kernel(head[1], target, parameters, registers, local, shared, constants, blocks, labels)


def _end(text: str, start: int) -> int:
    """Behind the brace that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[{}]|//[^\n]*", text[start:]):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "}":
            return start + found.end()
    raise ValueError("PTX: a kernel's body does not end")


def _parameter(line: str) -> tuple[str, str]:
    found = re.search(r"\.param\s+(?:\.align \d+ )?\.(\w+)\s.*?(\w+)(\[\d+\])?,?\s*$", line)
    return found[2], found[1] + (found[3] or "")


def _statements(body: str, number: int):
    """Declarations, labels and instructions with their lines, and the braces of scopes."""
    text = ""
    for line in body.split("\n"):
        line = line.split("//")[0].strip()
        number += 1
        if not text and re.match(r"\.loc\b", line):
            yield number, line
            continue
        if not text and (not line or re.match(r"\.(file|section|pragma|maxntid|minnctapersm|reqntid)\b", line)):
            continue
        text = f"{text} {line}".strip()
        while text:
            if text[0] == "{" or (text[0] == "}"):
                yield number, text[0]
                text = text[1:].strip()
            elif found := re.match(r"([\w$.]+):(?!:)\s*", text):
                yield number, found[1] + ":"
                text = text[found.end() :]
            elif ";" in text:
                statement, text = text.split(";", 1)
                text = text.strip()
                if statement.strip():
                    yield number, statement.strip()
            else:
                break


class _Scope(dict):
    """Between braces: the names declared here, by what they are called outside."""

    def __init__(self, number: int):
        self._number = number  # 0: the kernel's own

    def own(self, name: str) -> str:
        # Labels that LLVM makes ("$L__BB0_3") are unique.
        return name if self._number == 0 or name.startswith("$") else f"{name}@{self._number}"


def _instruction(text: str, line: int, source: str, scopes: list[_Scope]) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"PTX line {line} is not understood: {text!r}")

    def named(name: str) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    if found[3].startswith("bra"):
        operands = (scopes[-1].own(found[4].strip()),)
    else:
        operands = tuple(re.sub(r"[%$\w.]+", lambda match: named(match[0]), each) for each in _split(found[4]))
    guard = f"{found[1]}{named(found[2])}" if found[2] else None
    return Instruction(found[3], operands, guard, line, source)


def _split(text: str) -> list[str]:
    """Operands: at commas outside braces and brackets."""
    parts, depth = [""], 0
    for each in text:
        depth += each in "{[("
        depth -= each in "}])"
        if each == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += each
    return [part.strip() for part in parts if part.strip()]


def _blocks(statements: list[Instruction | str]) -> tuple[tuple[Block, ...], dict[str, int]]:
    targets = {
        each.operands[0]
        for each in statements
        if isinstance(each, Instruction) and each.parts[0] == "bra"
    }  # fmt: skip
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for each in statements:
        if isinstance(each, str):
            if each in targets:
                if blocks[-1]:
                    blocks.append([])
                labels[each] = len(blocks) - 1
            continue
        blocks[-1].append(each)
        if each.parts[0] in ("bra", "ret", "exit", "trap") or each.name.startswith(BARRIERS):
            blocks.append([])
    return tuple(tuple(block) for block in blocks), labels
