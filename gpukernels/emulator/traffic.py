"""Instructions that reach beyond a thread: memory, the other lanes, tensor cores, copies in the background."""

import re

from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.writer import Writer, bits_of, several


def load(w: Writer) -> None:
    """`ld`"""
    kind, into, space = w.parts[-1], several(w.operands[0]), _space(w)
    width = bits_of(kind)
    signed = f".view(np.int{width})" if kind[0] == "s" else ""
    kind = kind if signed else f"b{width}"
    if space == "param":
        name, offset = w.address(w.operands[1])
        if offset:
            raise Unsupported("a part of a parameter")
        whole = f"np.full(m.count, m.parameters[{w.symbols.parameters[name]}])"
        w.assign(into[0], f"{whole}.astype(np.uint{width}){signed}", kind)  # of a longer one, the lower part
        return
    place = w.place(w.operands[1], 64 if space == "global" else 32)
    w.lines.append(f"L = m.load_{space}({place}, {w.mask}, {width // 8}, {len(into)})")
    for i, each in enumerate(into):
        w.assign(each, f"L[{i}]{signed}", kind)


def store(w: Writer) -> None:
    """`st`"""
    space, width = _space(w), bits_of(w.parts[-1])
    given = ", ".join(w.full(each, f"b{width}") for each in several(w.operands[1]))
    w.lines.append(f"m.store_{space}({w.place(w.operands[0], 64 if space == 'global' else 32)}, {w.mask}, {given})")


def _space(w: Writer) -> str:
    for each in w.parts:
        if each.split("::")[0] in ("global", "shared", "local", "param"):
            return each.split("::")[0]
    raise Unsupported("an address of any memory")


def copy(w: Writer) -> None:
    """`cp.async`: of each thread, or of tiles."""
    name, ops = w.name, w.operands
    if name.startswith("cp.async.commit_group"):
        w.lines.append("m.commit_copies()")
    elif name.startswith("cp.async.wait_group"):
        w.lines.append(f"m.wait_copies({int(ops[0], 0)}, {w.mask})")
    elif name.startswith(("cp.async.ca", "cp.async.cg")):
        wanted = w.full(ops[3], "b32") if len(ops) == 4 else "None"
        places = f"{w.place(ops[0], 32)}, {w.place(ops[1], 64)}"
        w.lines.append(f"m.copy_async({places}, {w.mask}, {int(ops[2], 0)}, {wanted})")
    elif name.startswith("cp.async.bulk.tensor"):
        loads = "mbarrier" in name
        tile, memory = (ops[1], ops[0]) if loads else (ops[0], ops[1])
        base, at = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", tile).groups()
        starts = ", ".join(f"{w.full(each, 'b32')}.view(np.int32)" for each in several(at))
        arguments = f"m, {w.mask}, {w.full(base, 'b64')}, [{starts}], {w.place(memory, 32)}"
        w.lines.append(f"c.load_tile({arguments}, {w.place(ops[2], 32)})" if loads else f"c.store_tile({arguments})")
    else:
        raise Unsupported(name)


def barrier(w: Writer) -> None:
    """`mbarrier`"""
    name, ops = w.name, w.operands
    if name.startswith("mbarrier.init"):
        w.lines.append(f"c.start(m, {w.mask}, {w.place(ops[0], 32)}, {int(ops[1], 0)})")
    elif name.startswith("mbarrier.arrive.expect_tx") and ops[0] == "_":
        w.lines.append(f"c.arrive(m, {w.mask}, {w.place(ops[1], 32)}, {w.full(ops[2], 'b32')})")
    elif name.startswith("mbarrier.try_wait.parity"):
        w.assign(ops[0], f"c.ended(m, {w.mask}, {w.place(ops[1], 32)}, {w.full(ops[2], 'b32')})", "pred")
    else:
        raise Unsupported(name)


def tensor_core(w: Writer) -> None:
    """`mma`, `wgmma`, and the loads and stores of their tiles."""
    first, ops = w.parts[0], w.operands

    def words(operand: str, kind: str = "b32") -> str:
        return f"[{', '.join(w.full(each, kind) for each in several(operand))}]"

    if first == "mma":
        if not w.name.startswith("mma.sync.aligned.m16n8k") or w.parts[6:] != ["f32", w.parts[7], w.parts[7], "f32"]:
            raise Unsupported(w.name)
        w.lines.append(
            f"L = t.mma(m, {w.mask}, {words(ops[1])}, {words(ops[2])}, {words(ops[3])}, {_half_kind(w, 7)!r})"
        )
        kind = "f32"
    elif first == "wgmma":
        columns = re.fullmatch(r"m64n(\d+)k16", w.parts[4])
        if columns is None or w.parts[5] != "f32":
            raise Unsupported(w.name)
        a = words(ops[1]) if ops[1].startswith("{") else w.full(ops[1], "b64")
        w.lines.append(
            f"L = t.wgmma(m, {w.mask}, {words(ops[0])}, {a}, {w.full(ops[2], 'b64')}, {w.full(ops[3], 'pred')}, "
            f"{columns[1]}, {_half_kind(w, 6)!r}, {', '.join(ops[4:])})"
        )
        kind = "f32"
    elif first == "ldmatrix":
        count = len(several(ops[0]))
        w.lines.append(f"L = t.ldmatrix(m, {w.mask}, {w.place(ops[1], 32)}, {count}, {'trans' in w.parts})")
        kind = "b32"
    else:
        w.lines.append(f"t.stmatrix(m, {w.mask}, {w.place(ops[0], 32)}, {words(ops[1])}, {'trans' in w.parts})")
        return
    for i, each in enumerate(several(ops[0])):
        w.assign(each, f"L[{i}]", kind)


def _half_kind(w: Writer, at: int) -> str:
    if w.parts[at] not in ("f16", "bf16"):
        raise Unsupported(w.name)
    return w.parts[at]


def lanes(w: Writer) -> None:
    """`shfl`, `redux` and `elect`: between the threads of a warp."""
    first, ops = w.parts[0], w.operands
    if first == "shfl":
        numbers = ", ".join(w.full(each, "b32") for each in ops[1:4])
        into, *inside = ops[0].split("|")
        w.lines.append(f"L = m.shuffle({w.parts[2]!r}, {numbers}, {w.mask})")
        w.assign(into, "L[0]", "b32")
        if inside:
            w.assign(inside[0], "L[1]", "pred")
    elif first == "redux":
        kind = w.parts[-1]
        x = w.full(ops[1], kind) if kind[0] == "u" else f"{w.full(ops[1], 'b32')}.view(np.int32)"
        if kind not in ("u32", "s32"):
            raise Unsupported(w.name)
        w.assign(ops[0], f"m.reduce({w.parts[2]!r}, {x}, {w.full(ops[2], 'b32')}, {w.mask})", kind)
    else:
        lane, chosen = ops[0].split("|")
        w.lines.append(f"L = m.elect({w.mask})")
        w.assign(lane, "L[0]", "b32")
        w.assign(chosen, "L[1]", "pred")


def atomic(w: Writer) -> None:
    """`atom` and `red`"""
    kind, returns = w.parts[-1], w.parts[0] == "atom"
    space = _space(w)
    if space not in ("global", "shared") or kind[0] == "f":
        raise Unsupported(w.name)
    place, *given = w.operands[returns:]
    numbers = ", ".join(w.full(each, f"b{bits_of(kind)}") for each in given)
    place = w.place(place, 64 if space == "global" else 32)
    w.lines.append(f"L = m.atomic({space!r}, {w.parts[-2]!r}, {kind[0] == 's'}, {place}, {w.mask}, {numbers})")
    if returns:
        w.assign(w.operands[0], "L", f"b{bits_of(kind)}")
