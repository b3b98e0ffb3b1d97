"""What the kernels of interpreted launches touch, and whether dependent ones could overtake each other on a GPU.

`gpukernels.launches` says what each may do: behind its wait a kernel knows that all before have ended; before it, those
that the last kernel in front which lets the next one start behind its own wait has waited for. What it reads before, it
reads from the L2 cache: a multiprocessor's own may have a line from before. The interpreter runs one kernel after the
other and shows no race, but it knows every address.
"""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

#: Of a kernel's arguments, what its programs hand on to each other, in an order that an atomic counter gives.
HANDED_ON = ("acc_ptr", "stats_ptr", "arrivals_ptr")


class Touched:
    """One launch, or an op of torch that writes: addresses of bytes, by what was done there.

    Attributes:
        reads, early, writes, early_writes: by program; early is before its wait.
        cached: of what is read early, what may come from the first-level cache.
        waited: the programs that did. hasty: those that let the next kernel start before they did.
        handed_on: the bytes of HANDED_ON, first and one behind the last of each.
    """

    def __init__(self, name: str, *, dependent: bool = False, handed_on: Sequence[tuple[int, int]] = ()):
        self.name, self.dependent, self.handed_on = name, dependent, handed_on
        self.reads, self.early, self.cached, self.writes, self.early_writes = (defaultdict(list) for _ in range(5))
        self.waited: set[tuple] = set()
        self.hasty: set[tuple] = set()

    def add(self, kind: str, pointers, mask, *, cached: bool = False) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        pointed, wanted = np.broadcast_arrays(pointers.data, mask.data)
        found = (pointed[wanted.astype(bool)].astype(np.int64)[:, None] + np.arange(size)).ravel()
        program = tuple(interpreter_builder.grid_idx)
        early = self.dependent and program not in self.waited
        if kind == "writes" and early:
            self.early_writes[program].append(found)
        if kind == "reads" and early and cached:
            self.cached[program].append(found)
        (self.early if kind == "reads" and early else getattr(self, kind))[program].append(found)

    @property
    def written(self) -> np.ndarray:
        return _bytes(self.writes)


def _bytes(by_program: dict) -> np.ndarray:
    return _union(each for group in by_program.values() for each in group)


def _union(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *arrays]))


class _Writes(TorchDispatchMode):
    """torch's own ops that write an array: no kernel may read that early which comes right behind one."""

    def __init__(self, launches: list[Touched]):
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "aten" and op.name().partition(".")[0].endswith("_"):
            target, one = args[0], Touched(op.name())
            offsets = np.zeros((), np.int64)
            for size, stride in zip(target.shape, target.stride(), strict=True):
                offsets = offsets[..., None] + np.arange(size) * stride
            first = target.data_ptr() + offsets.ravel() * target.element_size()
            one.writes[()].append((first[:, None] + np.arange(target.element_size())).ravel())
            self._launches.append(one)
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def chain() -> Iterator[list[Touched]]:
    """While this lasts, launches under the interpreter and torch's writes are written down; the list grows."""
    launches: list[Touched] = []
    here: list[Touched] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, call = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__
    wait, trigger = tl.extra.cuda.gdc_wait, tl.extra.cuda.gdc_launch_dependents

    def seen_load(self, pointers, mask, other, modifier, *rest):
        here[-1].add("reads", pointers, mask, cached=modifier != ir.CACHE_MODIFIER.CG)
        return load(self, pointers, mask, other, modifier, *rest)

    def seen_store(self, pointers, value, mask, *rest, **options):
        here[-1].add("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def seen_atomic(self, op, pointers, value, mask, *rest, **options):
        here[-1].add("writes", pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest, **options)

    def seen_call(self, *arguments, **options):
        known = {name: value for name, value in options.items() if name in inspect.getfullargspec(self.fn).args}
        named = inspect.getcallargs(self.fn, *arguments, **known)
        spans = [
            (named[name].data_ptr(), named[name].data_ptr() + named[name].nbytes) for name in HANDED_ON if name in named
        ]
        here.append(Touched(self.fn.__name__, dependent=bool(named.get("DEPENDENT")), handed_on=spans))
        call(self, *arguments, **options)
        launches.append(here.pop())

    def seen_trigger(_semantic=None):
        program = tuple(interpreter_builder.grid_idx)
        if program not in here[-1].waited:
            here[-1].hasty.add(program)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = seen_load, seen_store
    InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__ = seen_atomic, seen_call
    tl.extra.cuda.gdc_wait = lambda _semantic=None: here[-1].waited.add(tuple(interpreter_builder.grid_idx))
    tl.extra.cuda.gdc_launch_dependents = seen_trigger
    try:
        with _Writes(launches):
            yield launches
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__ = atomic, call
        tl.extra.cuda.gdc_wait, tl.extra.cuda.gdc_launch_dependents = wait, trigger


def faults(launches: Sequence[Touched]) -> list[str]:
    """What could go wrong on a GPU, where a dependent kernel starts beside the one in front of it."""
    found, changing = [], _union(launch.written for launch in launches)
    for place, launch in enumerate(launches):
        if launch.dependent:
            if not launch.waited:
                found.append(f"{launch.name} never waits: the next one starts beside what came before")
            if launch.early_writes:
                found.append(f"{launch.name} writes before it has waited")
            for before in _beside(launches[:place]):
                if np.isin(_bytes(launch.early), before.written).any():
                    found.append(f"{launch.name} reads before its wait what {before.name} writes")
            if np.isin(_bytes(launch.cached), changing).any():
                found.append(f"{launch.name} reads before its wait, perhaps old lines of a cache, what changes")
        if _programs_race(launch):
            found.append(f"programs of {launch.name} touch what another one writes")
    return found


def _beside(before: Sequence[Touched]) -> Iterator[Touched]:
    """Of the launches before one, those that may still run when it starts, the last one first."""
    for launch in reversed(before):
        yield launch
        # It started when all before had ended; or it let the next one start when it knew that they had.
        if not launch.dependent or not launch.hasty:
            return


def _programs_race(launch: Touched) -> bool:
    """Whether a byte that one program writes is written or read by another, but for what they hand on in order."""
    programs = {program: i for i, program in enumerate({*launch.writes, *launch.reads, *launch.early})}

    def owned(*kinds):
        parts = [
            (each, np.full(each.shape, programs[program]))
            for kind in kinds
            for program, group in kind.items()
            for each in group
        ]
        places, owners = (np.concatenate([part[i] for part in parts]) for i in range(2))
        for first, end in launch.handed_on:
            outside = (places < first) | (places >= end)
            places, owners = places[outside], owners[outside]
        return places, owners

    if not launch.writes:
        return False
    places, owners = owned(launch.writes)
    order = np.argsort(places, kind="stable")
    places, owners = places[order], owners[order]
    if ((places[1:] == places[:-1]) & (owners[1:] != owners[:-1])).any():
        return True
    if not launch.reads and not launch.early:
        return False
    read, readers = owned(launch.reads, launch.early)
    at = np.searchsorted(places, read).clip(max=max(0, places.size - 1))
    return bool(places.size and ((places[at] == read) & (owners[at] != readers)).any())
