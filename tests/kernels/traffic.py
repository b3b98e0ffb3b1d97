"""What interpreted kernels really move: the distinct bytes that their loads and stores touch, launch by launch."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Moved(NamedTuple):
    """By one launch."""

    kernel: str
    arguments: dict[str, Any]
    read: int  # bytes at distinct addresses
    written: int


class _Addresses:
    """Where elements were, and how wide they are."""

    def __init__(self):
        self._by_size: dict[int, list[np.ndarray]] = {}

    def add(self, pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        pointed, wanted = np.broadcast_arrays(pointers.data, mask.data)
        found = pointed[wanted.astype(bool)]
        if found.size:
            self._by_size.setdefault(size, []).append(np.unique(found))

    @property
    def bytes(self) -> int:
        return sum(size * np.unique(np.concatenate(found)).size for size, found in self._by_size.items())


@contextlib.contextmanager
def traffic() -> Iterator[list[Moved]]:
    """While this lasts, every launch under the interpreter is counted; the list grows launch by launch."""
    launches: list[Moved] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call = GridExecutor.__call__
    read, written = _Addresses(), _Addresses()

    def counted_load(self, pointers, mask, *rest, **options):
        read.add(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self, pointers, value, mask, *rest, **options):
        written.add(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def counted_call(self, *arguments, **options):
        nonlocal read, written
        read, written = _Addresses(), _Addresses()
        call(self, *arguments, **options)
        known = {name: value for name, value in options.items() if name in inspect.getfullargspec(self.fn).args}
        named = inspect.getcallargs(self.fn, *arguments, **known)
        launches.append(Moved(self.fn.__name__, named, read.bytes, written.bytes))

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    GridExecutor.__call__ = counted_call
    try:
        yield launches
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = call
