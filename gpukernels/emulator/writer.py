"""One PTX instruction as lines of Python: its operands, its guard, and where results go."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpukernels.emulator import values
from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.memory import SHARED_BASE
from gpukernels.emulator.ptx import Instruction, Kernel

#: A descriptor is named by the address of its parameter; these are the addresses.
PARAMETER_BASE, PARAMETER_STEP = 1 << 60, 4096

#: NumPy's types by PTX's. bf16 is held as float32.
KINDS = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(re.search(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf16")


class Symbols:
    """What names in a kernel mean: registers have places, everything else has an address or a value."""

    def __init__(self, kernel: Kernel, constants: Mapping[str, np.ndarray]):
        self.registers = {name: i for i, name in enumerate(kernel.registers)}
        self.kinds = kernel.registers
        self.parameters = {name: i for i, (name, _) in enumerate(kernel.parameters)}
        self.addresses = {"global_smem": SHARED_BASE}
        self.addresses |= {name: PARAMETER_BASE + PARAMETER_STEP * i for name, i in self.parameters.items()}
        self.addresses |= {name: array.ctypes.data for name, array in constants.items()}
        self.local_bytes = self._lay(kernel.local, 0)
        self.shared_bytes = self._lay(kernel.shared, SHARED_BASE)

    def _lay(self, sizes: Mapping[str, int], start: int) -> int:
        """Gives each name an address from `start` on; how many bytes they take."""
        end = start
        for name, size in sizes.items():
            self.addresses[name] = end
            end += -(-size // 16) * 16
        return end - start


class Writer:
    """Collects the lines of one instruction.

    In them `m` is the `Machine`, `R` its registers, `M` the threads that run (where not all do), `G` those of them
    that the guard lets through. Registers are arrays of unsigned integers, one for each thread, and never changed in
    place.
    """

    def __init__(self, symbols: Symbols, constant: Callable[[Any], str], instruction: Instruction, masked: bool):
        self.symbols, self._constant = symbols, constant
        self.name, self.operands, self.parts = instruction.name, instruction.operands, instruction.parts
        self.lines: list[str] = []
        self.mask = "M" if masked else "None"
        if instruction.guard:
            guard = self.value(instruction.guard, "pred")
            self.lines.append(f"G = {guard}" + (" & M" if masked else ""))
            self.mask = "G"

    def value(self, operand: str, kind: str) -> str:
        """An expression for an operand: an array of what `kind` means to NumPy, or a scalar."""
        if operand.startswith("!"):
            return f"(~{self.value(operand[1:], kind)})"
        if operand in self.symbols.registers:
            text, have = f"R[{self.symbols.registers[operand]}]", self.symbols.kinds[operand]
            if kind == "pred":
                return text
            if bits_of(have) != bits_of(kind):
                text += f".astype(np.uint{bits_of(kind)})"
            if kind == "bf16":
                return f"v.from_bf16({text})"
            return text if kind[0] in "bu" or kind.endswith("x2") else f"{text}.view(np.{KINDS[kind].__name__})"
        if re.fullmatch(r"%(n?tid|n?ctaid|laneid|clusterid|cluster_ctarank|cluster_ctaid)(\.[xyz])?", operand):
            text = f"m.special[{operand!r}]"
            return text if bits_of(kind) == 32 else f"{text}.astype(np.uint{bits_of(kind)})"
        return self._constant(self._number(operand, kind))

    def full(self, operand: str, kind: str) -> str:
        """As `value`, and an array in any case."""
        dtype = "bool_" if kind == "pred" else f"uint{bits_of(kind)}"
        return f"bits({self.value(operand, kind)}, m.count, np.{dtype})"

    def _number(self, operand: str, kind: str) -> Any:
        """An immediate operand, or the address of a symbol."""
        number: Any
        if operand in self.symbols.addresses:
            number = self.symbols.addresses[operand]
        elif found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            word = np.uint32(int(found[1], 16))
            return word.view(np.float32) if is_float(kind) else word
        elif found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return np.uint64(int(found[1], 16)).view(np.float64)
        elif re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
        else:
            raise Unsupported(f"the operand {operand!r}")
        if kind == "pred":
            return np.bool_(number != 0)
        word = np.array([number & (2 ** bits_of(kind) - 1)], f"uint{bits_of(kind)}")
        if kind == "bf16":
            return values.from_bf16(word)[0]
        return word.view(KINDS[kind])[0] if kind in KINDS else word[0]

    def assign(self, operand: str, expression: str, kind: str) -> None:
        """`expression`, of what `kind` means to NumPy, into a register, for the threads that run."""
        if operand == "_":
            return
        place, width = self.symbols.registers[operand], bits_of(self.symbols.kinds[operand])
        if kind == "bf16":
            expression, kind = f"v.to_bf16({expression})", "b16"
        if kind != "pred" and bits_of(kind) != width:  # a narrow value in a wide register keeps its sign
            expression = f"np.asarray({expression}).astype(np.{'int' if kind[0] == 's' else 'uint'}{width})"
        dtype = "bool_" if kind == "pred" else f"uint{width}"
        text = f"bits({expression}, m.count, np.{dtype})"
        self.lines.append(
            f"R[{place}] = " + (text if self.mask == "None" else f"where({self.mask}, {text}, R[{place}])")
        )

    def address(self, operand: str) -> tuple[str, int]:
        """`[%rd1+16]`: the base, and the offset in bytes."""
        found = re.fullmatch(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise Unsupported(f"the address {operand!r}")
        return found[1], int(found[2] or "0", 0)

    def place(self, operand: str, width: int) -> str:
        """An address of so many bits in brackets, as an array."""
        base, offset = self.address(operand)
        if base in self.symbols.registers:
            width = bits_of(self.symbols.kinds[base])
        text = self.full(base, f"u{width}")
        return f"({text} + {self._constant(KINDS[f'u{width}'](offset % 2**width))})" if offset else text


def several(operand: str) -> list[str]:
    """The registers in braces, or the one without."""
    return [each.strip() for each in operand.strip("{} ").split(",")]
