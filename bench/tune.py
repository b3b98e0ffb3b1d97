"""Tiles tried on this GPU: what `python -m bench.kernels --tune OP` does, and the rows to paste.

A candidate takes the place of what a tile table gives, in the launcher that asks for it. All are compiled first,
many at a time. Each has to pass the gate, and is then timed side by side with the present tile, as `bench.kernels`
times providers.
"""

import contextlib
import datetime
import importlib
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple
from unittest import mock

from bench import compiling, gate, kernel_cases, kernel_tables
from bench.gpu_timing import Clock, Device
from bench.kernel_cases import Case
from bench.kernel_rows import clocks, in_a_line, work
from bench.report import show
from bench.rivals import OPS, OURS, Provider
from bench.timing import interleaved


class Knob(NamedTuple):
    """A tile function, as one launcher asks it, and what is tried of its fields."""

    module: str  # of the launcher, in gpukernels.kernels
    function: str | None  # None: the fields are the module's constants
    direction: str
    choices: dict[str, tuple[int, ...]]
    row: Callable[[Any], str]  # a tile as its table has it
    part: int | None = None  # which tile of several that the function gives
    fields: tuple[str, ...] = ()  # the names, where it gives a plain tuple

    @property
    def name(self) -> str:
        return self.function or f"{self.module}: {', '.join(self.choices)}"

    @contextlib.contextmanager
    def trying(self, changes: dict[str, int], seen: list[Any] | None = None) -> Iterator[None]:
        """While this lasts, the launcher gets tiles with these fields changed; `seen` collects them."""
        module = importlib.import_module(f"gpukernels.kernels.{self.module}")
        if self.function is None:
            with contextlib.ExitStack() as stack:
                for name, value in changes.items():
                    stack.enter_context(mock.patch.object(module, name, value))
                if seen is not None:
                    seen.append(tuple(getattr(module, name) for name in self.choices))
                yield
            return
        original = getattr(module, self.function)

        def changed(*args: Any, **options: Any) -> Any:
            given = original(*args, **options)
            own = given if self.part is None else given[self.part]
            own = namedtuple("Tile", self.fields)(*own) if self.fields else own
            own = own._replace(**changes)
            if seen is not None:
                seen.append(own)
            return own if self.part is None else (*given[: self.part], own, *given[self.part + 1 :])

        with mock.patch.object(module, self.function, changed):
            yield

    def during(self, changes: dict[str, int], clock: Clock) -> Clock:
        """The clock, with the tile in place: one that launches from Python asks for it again."""

        def tried() -> float:
            with self.trying(changes):
                return clock()

        return tried

    def candidates(self) -> list[dict[str, int]]:
        return [dict(zip(self.choices, each, strict=True)) for each in itertools.product(*self.choices.values())]


def _attention_row(tile: Any) -> str:
    return f"{tile.BLOCK_D}: ({tile.BLOCK_M}, {tile.BLOCK_N}, {tile.num_warps}, {tile.num_stages}),"


def _norms() -> list[Knob]:
    # Pieces of a row that a warp has to itself, and whole rows for several warps.
    forward = {"BLOCK_M": (1, 2, 4, 8), "BLOCK_N": (256, 1024, 2048), "num_warps": (2, 4, 8)}
    backward = {"BLOCK_M": (1, 2, 4), "BLOCK_N": (256, 1024, 2048), "num_warps": (4, 8)}
    backward["per_multiprocessor"] = (1, 2, 3, 4)
    return [
        Knob("norm", "norm_forward_tile", "forward", forward, repr),
        Knob("norm", "norm_backward_tile", "backward", backward, repr),
    ]


def _attention() -> list[Knob]:
    forward = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    backward = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)}
    both = [
        Knob("attention.backward", "attention_backward_tiles", "backward", backward, _attention_row, part)
        for part in (0, 1)
    ]
    return [Knob("attention.forward", "attention_forward_tile", "forward", forward, _attention_row), *both]


def _products() -> list[Knob]:
    choices = {"BLOCK_M": (64, 128), "BLOCK_N": (128, 256), "BLOCK_K": (32, 64), "num_warps": (4, 8)}
    choices["num_stages"] = (3, 4, 5)
    return [Knob("matmul", name, "forward", choices, repr) for name in ("descriptor_tile", "pointer_tile")]


def _few_rows() -> list[Knob]:
    choices = {"BLOCK_N": (8, 16, 32), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3)}
    return [Knob("few_rows", "few_rows_tile", "forward", choices, repr)]


def _pointwise() -> list[Knob]:
    choices = {"BLOCK_M": (1, 2, 4), "BLOCK_N": (512, 1024, 2048), "num_warps": (4, 8)}
    return [Knob("pointwise", "pointwise_tile", direction, choices, repr) for direction in ("forward", "backward")]


def _losses() -> list[Knob]:
    choices = {"BLOCK_V": (4096, 8192, 16384), "num_warps": (8, 16, 32)}
    return [Knob("loss", "_tile", direction, choices, repr) for direction in ("forward", "both")]


def _losses_in_chunks() -> list[Knob]:
    chunks = {"_CHUNK_BYTES": (1 << 28, 1 << 29, 1 << 30)}
    return [Knob("linear_loss", None, "both", chunks, _values), _losses()[1]]


def _values(constants: Any) -> str:
    return ", ".join(map(str, constants))


def _embeddings() -> list[Knob]:
    forward = {"BLOCK_C": (256, 512, 1024, 2048), "num_warps": (1, 2, 4)}
    backward = {"BLOCK_M": (1, 2, 4, 8), "BLOCK_C": (256, 512, 1024), "num_warps": (1, 2, 4)}
    return [
        Knob("embedding", "embedding_tile", "forward", forward, repr),
        Knob("embedding", "embedding_tile", "backward", backward, repr),
    ]


#: By op. A function that the launcher does not ask on this GPU is passed over.
KNOBS: dict[str, list[Knob]] = {
    "attention": _attention(),
    "decode_attention": [
        Knob(
            "attention.decode",
            "_tile",
            "forward",
            {"BLOCK_N": (16, 32, 64, 128), "num_warps": (2, 4, 8)},
            repr,
            fields=("BLOCK_N", "num_warps"),
        ),
    ],
    "layer_norm": _norms(),
    "rms_norm": _norms(),
    "linear": _products(),
    "linear_gelu": _products(),
    "few_rows": _few_rows(),
    "norm_linear": _few_rows(),
    "rms_norm_linear": _few_rows(),
    "cross_entropy": _losses(),
    "linear_cross_entropy": _losses_in_chunks(),
    "swiglu": _pointwise(),
    "gelu": _pointwise(),
    "embedding": _embeddings(),
    "adamw": [Knob("optimizer", None, "forward", {"_BLOCK": (512, 1024, 2048, 4096), "_WARPS": (2, 4, 8)}, _values)],
    "sample": [Knob("sampling", None, "forward", {"_BLOCK": (2048, 4096, 8192), "_WARPS": (4, 8, 16)}, _values)],
    "rope": [Knob("rope", "rope_tile", "forward", {"BLOCK_H": (1, 2, 8, 32), "num_warps": (1, 2, 4)}, repr)],
}


def tune(op: str, device: Device, *, quick: bool, rounds: int) -> None:
    """Prints a table of tiles for every case and knob of an op, and after each the row to paste.

    Raises:
        ValueError: an op whose tiles are not in a table.
    """
    if op not in KNOBS:
        raise ValueError(f"the op to tune must be one of {', '.join(KNOBS)}, got {op!r}")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(compiling.processes()) if device.kind == "cuda" else None
        for case in kernel_cases.chosen([op], quick=quick):
            for number, knob in enumerate(KNOBS[op]):
                try:
                    _tuned(case, number, knob, device, rounds, pool)
                except Exception as fault:  # of the tile as it is now: other shapes can still be tried
                    print(f"{case.name}, {knob.direction}: {knob.name}: {in_a_line(fault)}\n")


class _Tried(NamedTuple):
    tile: Any
    milliseconds: float
    speedup: float  # over the present tile, side by side


def _tuned(case: Case, number: int, knob: Knob, device: Device, rounds: int, pool: Executor | None) -> None:
    truth = gate.true(case, device.kind)
    tile, present = _clock(case, knob, {}, truth, device)
    if tile is None:
        return  # the launcher does not ask on this GPU
    if pool is not None:  # what does not compile says so again below
        compiling.compiled([("tile", (case.name, number, changes)) for changes in knob.candidates()], pool)
    tried, faults = {}, {}
    for changes in ({}, *knob.candidates()):
        name = ", ".join(f"{field} {value}" for field, value in changes.items()) or "as it is now"
        try:
            tile, clock = _clock(case, knob, changes, truth, device)
            times = interleaved({"now": present, "tried": clock}, rounds=rounds, pause=0)
        except Exception as fault:  # what is wrong, does not compile, or does not fit
            faults[name] = in_a_line(fault)
            continue
        own = times["tried"]
        tried[name] = _Tried(tile, 1e3 * own.median, own.speedup(times["now"]))
    if not tried:
        raise RuntimeError(f"no tile can be timed, not even the present one: {next(iter(faults.values()))}")
    order = sorted(tried, key=lambda name: -tried[name].speedup)
    rows = [(name, kernel_tables.digits(tried[name].milliseconds), f"{tried[name].speedup:.3f}") for name in order]
    rows += [(name, "", fault) for name, fault in faults.items()]
    show(f"{case.name}, {knob.direction}: {knob.name}", ("tile", "ms", "times as fast as now"), rows)
    best, amount = tried[order[0]], work(case, knob.direction)
    speed = f"{kernel_tables.digits(amount.rate(best.milliseconds / 1e3))} {amount.unit}"
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    print(f"    {knob.row(best.tile)}  # measured on {device.name}, {today}: {speed} ({case.shape})\n")


def _clock(case: Case, knob: Knob, changes: dict[str, int], truth: gate.Truth, device: Device) -> tuple[Any, Clock]:
    """The tile that the launcher gets with these changes, None if it asks for none, and the clock of our op with it.

    Raises:
        ValueError: the answer is wrong.
        Exception: what Triton or torch raise where it does not compile, or not fit.
    """
    device.release()
    seen: list[Any] = []
    provider = Provider(OURS, OPS[case.op].ours, at_once=OPS[case.op].at_once)
    with knob.trying(changes, seen):
        verdict = gate.judge(case, provider, truth, device.kind)[knob.direction]
        if not verdict.right:
            raise ValueError(f"wrong answer, {verdict.of_bound:.3g} times its bound")
        graph, launched = clocks(case, knob.direction, provider, {}, device)
    return seen[-1] if seen else None, knob.during(changes, graph or launched)
