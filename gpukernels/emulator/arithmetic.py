"""Instructions that make a value of values: arithmetic, logic, comparisons and conversions."""

from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.writer import KINDS, Writer, bits_of, is_float, several

_SIGNS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ROUNDINGS = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
_APPROXIMATE = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh")
_UNSUPPORTED = {"rz", "rm", "rp", "sat", "relu", "xorsign"}


def move(w: Writer) -> None:
    """`mov`, which also takes words apart and puts them together; `cvta`: an address has one form only."""
    kind, into, source = w.parts[-1], *w.operands
    width = bits_of(kind)
    if into.startswith("{"):
        parts = several(into)
        part = width // len(parts)
        for i, each in enumerate(parts):
            w.assign(
                each,
                f"({w.value(source, f'b{width}')} >> np.uint{width}({i * part})).astype(np.uint{part})",
                f"b{part}",
            )
    elif source.startswith("{"):
        parts = several(source)
        part = width // len(parts)
        words = (
            f"({w.full(each, f'b{part}')}.astype(np.uint{width}) << np.uint{width}({i * part}))"
            for i, each in enumerate(parts)
        )
        w.assign(into, " | ".join(words), f"b{width}")
    else:
        w.assign(into, w.value(source, kind), kind)


def compare(w: Writer) -> None:
    """`setp`; of pairs of 16-bit numbers with two results."""
    comparison, kind = w.parts[1], w.parts[-1]
    if len(w.operands) != 3 or set(w.parts[2:-1]) - {"ftz"}:
        raise Unsupported("a comparison joined with another predicate")
    into = w.operands[0].split("|")
    if kind.endswith("x2"):
        w.lines.append(f"A = {_halves(w)}")
        for i, each in enumerate(into):
            w.assign(each, _compared(comparison, *(_half(kind, f"A[{j}][{i}]") for j in (0, 1)), True), "pred")
        return
    if len(into) > 1:
        raise Unsupported("a comparison with two results")
    a, b = (_operand(w, i, kind) for i in (1, 2))
    w.assign(into[0], _compared(comparison, a, b, is_float(kind)), "pred")


def _compared(comparison: str, a: str, b: str, floating: bool) -> str:
    unordered = f"(np.isnan({a}) | np.isnan({b}))"
    if comparison in ("nan", "num"):
        return unordered if comparison == "nan" else f"~{unordered}"
    if floating and comparison == "ne":
        return f"(({a} != {b}) & ~{unordered})"
    if comparison in _COMPARISONS:
        return f"({a} {_COMPARISONS[comparison]} {b})"
    if floating and comparison[-1] == "u" and comparison[:-1] in _COMPARISONS:
        return f"(({a} {_COMPARISONS[comparison[:-1]]} {b}) | {unordered})"
    raise Unsupported(f"the comparison {comparison}")


def convert(w: Writer) -> None:
    """`cvt`"""
    flags, into, source = w.parts[1:-2], w.parts[-2], w.parts[-1]
    if set(flags) & _UNSUPPORTED:
        raise Unsupported(".".join(flags))
    if into in ("f16x2", "bf16x2"):  # the first operand becomes the upper half
        high, low = (f"bits({_narrowed(w.value(each, source), into)}, m.count, np.uint16)" for each in w.operands[1:])
        w.assign(w.operands[0], f"v.joined({low}, {high})", "b32")
        return
    x = w.value(w.operands[1], source)
    ftz = "ftz" in flags
    if ftz and source == "f32":
        x = f"v.flush({x})"
    rounding = next((_ROUNDINGS[each] for each in flags if each in _ROUNDINGS), None)
    if is_float(source) and not is_float(into):
        text = f"v.to_integer({x}, np.{KINDS[into].__name__}, {rounding})"
    elif rounding:
        text = f"{rounding}({x})"
    else:
        text = f"np.asarray({x}).astype(np.{'float32' if into == 'bf16' else KINDS[into].__name__})"
    w.assign(w.operands[0], f"v.flush({text})" if ftz and into == "f32" else text, into)


def _narrowed(x: str, kind: str) -> str:
    return f"v.to_bf16({x})" if kind[0] == "b" else f"np.asarray({x}).astype(np.float16)"


def _half(kind: str, word: str) -> str:
    """16 bits as a number: float16, or float32 of bfloat16."""
    return f"v.from_bf16({word})" if kind[0] == "b" else f"{word}.view(np.float16)"


def _halves(w: Writer) -> str:
    """The sources, each as its lower and its upper half."""
    words = (w.full(each, "b32") for each in w.operands[1:])
    return ", ".join(f"v.halves({word})" for word in words)


def pairs(w: Writer) -> None:
    """Two 16-bit numbers in each register."""
    first, kind = w.parts[0], w.parts[-1]
    w.lines.append(f"A = [{_halves(w)}]")
    halves = []
    for i in (0, 1):
        x = [_half(kind, f"A[{j}][{i}]") for j in range(len(w.operands) - 1)]
        if first == "fma":
            text = f"v.fma({', '.join(f'{each}.astype(np.float32)' for each in x)})"
        elif first in ("min", "max"):
            text = f"np.f{first}({', '.join(x)})"
        elif first in ("add", "sub", "mul"):
            text = f"({x[0]} {(_SIGNS | {'mul': '*'})[first]} {x[1]})"
        else:
            raise Unsupported(w.name)
        halves.append(f"v.to_bf16({text})" if kind[0] == "b" else f"{text}.astype(np.float16).view(np.uint16)")
    w.assign(w.operands[0], f"v.joined({', '.join(halves)})", "b32")


def _operand(w: Writer, i: int, kind: str) -> str:
    text = w.value(w.operands[i], kind)
    return f"v.flush({text})" if "ftz" in w.parts and kind == "f32" else text


def compute(w: Writer) -> None:
    """All others."""
    first, kind, flags = w.parts[0], w.parts[-1], set(w.parts[1:-1])
    if kind in ("f16x2", "bf16x2"):
        pairs(w)
        return
    if flags & (_UNSUPPORTED - {"relu"}) or kind not in {*KINDS, "bf16", "pred"}:
        raise Unsupported(w.name)
    text, out = (_float if is_float(kind) else _integer)(w, first, kind, flags)
    w.assign(w.operands[0], f"v.flush({text})" if "ftz" in flags and out == "f32" else text, out)


def _float(w: Writer, first: str, kind: str, flags: set[str]) -> tuple[str, str]:
    x = [_operand(w, i, kind) for i in range(1, len(w.operands) - (first == "selp"))]
    if first == "selp":
        return f"where({w.value(w.operands[3], 'pred')}, {x[0]}, {x[1]})", kind
    if first in ("add", "sub", "mul"):
        return f"({x[0]} {(_SIGNS | {'mul': '*'})[first]} {x[1]})", kind
    if first in ("fma", "mad") and kind in ("f32", "f16", "bf16"):
        text = f"v.fma({', '.join(x)})"
        return (f"{text}.astype(np.float16)" if kind == "f16" else text), kind
    if first in ("min", "max"):  # of a number and NaN the number
        return f"np.{'' if 'NaN' in flags else 'f'}{first}{'imum' if 'NaN' in flags else ''}({x[0]}, {x[1]})", kind
    if first == "neg":
        return f"-{x[0]}", kind
    if first == "abs":
        return f"np.abs({x[0]})", kind
    if first == "div":
        return (f"m.approximately_divide({x[0]}, {x[1]})" if flags & {"full", "approx"} else f"({x[0]} / {x[1]})"), kind
    if first == "sqrt" and "rn" in flags:
        return f"np.sqrt({x[0]})", kind
    if first == "rcp" and "rn" in flags:
        return f"(np.float32(1) / {x[0]})", kind
    if first in _APPROXIMATE and kind == "f32":
        return f"m.approximate({first!r}, {x[0]})", kind
    raise Unsupported(w.name)


def _integer(w: Writer, first: str, kind: str, flags: set[str]) -> tuple[str, str]:
    ops, wide = w.operands, "s64" if kind == "s32" else "u64"
    dtype = "bool_" if kind == "pred" else KINDS[kind].__name__

    def x(i: int) -> str:
        return w.full(ops[i], kind) + ("" if kind[0] in "bu" or kind == "pred" else f".view(np.{dtype})")

    if first in ("add", "sub", "and", "or", "xor"):
        return f"({x(1)} {_SIGNS[first]} {x(2)})", kind
    if first in ("shl", "shr"):  # NumPy's shifts by the width and more are PTX's
        return f"({x(1)} {_SIGNS[first]} {w.full(ops[2], 'u32')}.astype(np.{dtype}))", kind
    if first in ("mul", "mad") and "wide" in flags:
        product = f"{x(1)}.astype(np.{KINDS[wide].__name__}) * {x(2)}.astype(np.{KINDS[wide].__name__})"
        return f"({product}{'' if first == 'mul' else f' + {w.value(ops[3], wide)}'})", wide
    if first == "mul":
        return (f"v.high_product({x(1)}, {x(2)})" if "hi" in flags else f"({x(1)} * {x(2)})"), kind
    if first == "madc" or "cc" in flags:
        return _with_carry(w, first, kind, flags), kind
    if first == "mad":
        return f"({x(1)} * {x(2)} + {x(3)})", kind
    if first in ("min", "max"):
        text = f"np.{first}imum({x(1)}, {x(2)})"
        return (f"np.maximum({text}, np.{dtype}(0))" if "relu" in flags else text), kind
    if first in ("not", "neg"):
        return f"{'~' if first == 'not' else '-'}{x(1)}", kind
    if first == "abs":
        return f"np.abs({x(1)})", kind
    if first == "selp":
        return f"where({w.value(ops[3], 'pred')}, {x(1)}, {x(2)})", kind
    if first in ("div", "rem"):
        return f"v.{'divide' if first == 'div' else 'remainder'}({x(1)}, {x(2)})", kind
    if first == "bfe":
        return f"v.bit_field({x(1)}, {int(ops[2], 0)}, {int(ops[3], 0)})", kind
    if first == "popc":
        return f"np.bitwise_count({x(1)}).astype(np.uint32)", "b32"
    if first == "prmt" and not flags:
        return f"v.permute({x(1)}, {x(2)}, {w.value(ops[3], 'u32')})", kind
    if first == "shf" and "wrap" in flags:
        return f"v.funnel({x(1)}, {x(2)}, {w.full(ops[3], 'u32')}, {'l' in flags})", kind
    raise Unsupported(w.name)


def _with_carry(w: Writer, first: str, kind: str, flags: set[str]) -> str:
    """`mad.cc` and `madc`: 32 bits of a product, a third number, and the carry from before."""
    if first not in ("mad", "madc") or kind != "u32":
        raise Unsupported(w.name)
    a, b, c = (f"{w.full(each, 'u32')}.astype(np.uint64)" for each in w.operands[1:])
    half = "& np.uint64(0xFFFFFFFF)" if "lo" in flags else ">> np.uint64(32)"
    w.lines.append(f"L = (({a} * {b}) {half}) + {c}" + (" + m.carry" if first == "madc" else ""))
    if "cc" in flags:
        carry = "L >> np.uint64(32)"
        w.lines.append("m.carry = " + (carry if w.mask == "None" else f"where({w.mask}, {carry}, m.carry)"))
    return "L.astype(np.uint32)"
