"""A model's weights: one mapping of names to arrays, allocated once, grouped by block for the forward."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from model.device import Device


@dataclass(frozen=True)
class Slot:
    """Where one parameter comes from and what shape it has."""

    name: str
    source: str  # its name in a checkpoint
    shape: tuple[int, ...]  # (out, in) for a product
    transposed: bool = False  # the checkpoint stores (in, out)
    padded: int | None = None  # rows of its memory, those behind the shape's zeros; default as many as it has
    joined: str | None = None  # of slots one after the other with the same name here, which lie together in memory

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layered(self) -> bool:
        """Whether it is one of a block's."""
        return self.name.startswith("blocks.")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def padded_shape(self) -> tuple[int, ...]:
        return self.shape if self.padded is None else (self.padded, *self.shape[1:])


def padded_rows(vocabulary: int) -> int:
    """Of a table of tokens: so many logits in a row that a GPU reads every row 16 bytes at a time."""
    return -(-vocabulary // 64) * 64


_ALIGNMENT = 64  # elements: 128 bytes at least, what wide loads of any device ask for


def padded_sizes(slots: Iterable[Slot]) -> list[int]:
    """Elements of memory that each parameter takes, its padding and what aligns the next one counted."""
    sizes, start, slots = [], 0, list(slots)
    for slot, behind in itertools.zip_longest(slots, slots[1:]):
        stop = start + math.prod(slot.padded_shape)
        if not (slot.joined and behind is not None and behind.joined == slot.joined):
            stop = -(-stop // _ALIGNMENT) * _ALIGNMENT
        sizes.append(stop - start)
        start = stop
    return sizes


class Parameters(MutableMapping):
    """The parameters by name ("blocks.0.qkv.weight"); products are (out, in).

    Assigning copies into the parameter's own memory, which never moves; a value of another shape or
    dtype is refused, and so is a name that the model does not have. `root` holds what is outside the
    blocks and `blocks[i]` the slice of block i by its short names ("qkv.weight"): the same arrays.
    `padded` has the tables of tokens once more, with rows of zeros behind the last; in `blocks`, what slots join
    to is there too, as one array.
    """

    def __init__(self, slots: Iterable[Slot], device: Device, dtype: str):
        self.slots = {slot.name: slot for slot in slots}
        self.device, self.dtype = device, dtype
        self.activation_dtype = device.activation_dtype(dtype)
        self.padded: dict = {}
        self._arrays = {}
        # One allocation: the whole of it lies in the system's large pages, which reading it through needs.
        sizes = padded_sizes(self.slots.values())
        memory, start = device.empty((sum(sizes),), dtype), 0
        for slot, size in zip(self.slots.values(), sizes, strict=True):
            array = memory[start : start + slot.size].reshape(slot.shape)
            if slot.padded is not None:
                memory[start + slot.size : start + size] = 0
                self.padded[slot.name] = memory[start : start + math.prod(slot.padded_shape)].reshape(slot.padded_shape)
            self._arrays[slot.name], start = array, start + size
        self.root, self.blocks = grouped([*self._arrays.items(), *self._joined(memory, sizes)])

    def _joined(self, memory: Any, sizes: list[int]) -> Iterator[tuple[str, Any]]:
        """What the slots with the same `joined` are together: their rows, one below the other."""
        starts = itertools.accumulate(sizes, initial=0)
        placed = zip(self.slots.values(), starts, strict=False)
        for name, group in itertools.groupby(placed, key=lambda each: each[0].joined):
            if name is not None:
                slots, (start, *_) = zip(*group, strict=True)
                shape = (sum(slot.shape[0] for slot in slots), *slots[0].shape[1:])
                yield name, memory[start : start + math.prod(shape)].reshape(shape)

    @property
    def count(self) -> int:
        """How many numbers the model has."""
        return sum(slot.size for slot in self.slots.values())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def __getitem__(self, name: str):
        return self._arrays[name]

    def __setitem__(self, name: str, value) -> None:
        if name not in self._arrays:
            raise KeyError(f"{name}: the model has no such parameter")
        array = self._arrays[name]
        if not isinstance(value, type(array)):
            wanted, got = type(array), type(value)
            raise TypeError(
                f"{name}: must be a {wanted.__module__}.{wanted.__name__}, got {got.__module__}.{got.__name__}"
            )
        if tuple(value.shape) != tuple(array.shape):
            raise ValueError(f"{name}: must have the shape {tuple(array.shape)}, got {tuple(value.shape)}")
        if value.dtype != array.dtype:
            raise TypeError(f"{name}: must have the dtype {array.dtype}, got {value.dtype}")
        self.device.assign(array, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a model's parameters cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Lazy(Mapping):
    """The names of parameters, for values that are made when they are asked for: those of files, or of training."""

    def __init__(self, slots: Mapping[str, Slot]):
        self.slots = slots

    def __contains__(self, name: object) -> bool:
        return name in self.slots  # without making the value

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def grouped(named: Iterable[tuple[str, Any]]) -> tuple[dict, list[dict]]:
    """What is outside the blocks by its name, and for each block what is in it by its short name ("qkv.weight")."""
    root: dict = {}
    blocks: list[dict] = []
    for name, array in named:
        group, _, short = name.partition(".")
        if group != "blocks":
            root[name] = array
            continue
        layer, _, short = short.partition(".")
        while len(blocks) <= int(layer):
            blocks.append({})
        blocks[int(layer)][short] = array
    return root, blocks
