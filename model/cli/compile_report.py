"""`gpukernels compile-report`: what the kernels of a model compile to, for any GPU, without one."""

import importlib.util
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from model.cli.options import Json, check_output, progress_bar, table_console
from model.errors import ModelError
from model.page import Page

#: One workload for one capability: (name, capability, rows).
Part = tuple[str, int, list]

_CODE = ("kernel", "regs", "spill", "shared KiB", "resident", "tensor cores", "loads", "stores")
_COST = ("kernel", "launches", "MB", "GFLOP")
_LEGEND = (
    "Registers, spilled bytes (of a thread) and instructions are read from the machine code. Resident is how many "
    "blocks one multiprocessor holds at a time, and what there is no more of. Loads and stores are those of global "
    "memory: 4x16 are four instructions of 16 bytes a thread, tma moves whole tiles. Megabytes are what all launches "
    "have to move; a roofline time is that of the bytes or of the operations, whichever is longer, by the GPU's data "
    "sheet: no kernel is faster."
)


def compile_report(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload", "-w", help="A step, as gpt2/prefill, or all of a model, as gpt2-xl. May be given again. "
            "Default: gpt2.", show_default=False,
        ),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="80, 89, 90, 100 or all; may be given again. Default: 90.", show_default=False),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A GPU in place of --arch: A100, H100, H200 or 'RTX 4090'.", show_default=False),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Only kernels with this in their name.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32; default float16, and bfloat16 for training.",
                     show_default=False),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many compile side by side; default one for each core.",
                                 show_default=False),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.", show_default=False)] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compile what a model launches, and show registers, spills, occupancy, instructions, bytes and roofline times.

    No GPU is needed. The first run compiles; what it compiled is kept in Triton's cache.
    """
    _require_triton()
    from gpukernels.compile_report import gather

    capabilities = _capabilities(arch or [], gpu or [])
    steps = _steps(workload or ["gpt2"], dtype)
    check_output("--html", html)
    found: dict[tuple[str, int], list] = {}
    total = len(steps) * len(capabilities)
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=total)
        for name, capability, rows in gather(steps, capabilities, processes=processes):
            found[name, capability] = [row for row in rows if kernel is None or kernel in row.kernel]
            bar.update(task, advance=1, description=f"{name}, sm_{capability}")
    parts = [(name, capability, found[name, capability]) for capability in capabilities for name in steps]
    if not any(rows for *_, rows in parts):
        kernels = "these steps launch no kernel" if kernel is None else f"no kernel has {kernel!r} in its name"
        raise ModelError(f"--kernel: {kernels}")
    if html is not None:
        _page(parts).write(html)
    if as_json:
        print(json.dumps(_document(parts)))
    else:
        _print(parts, table_console(120))


def _require_triton() -> None:
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"compile-report: {package} is not installed: pip install 'gpukernels[cuda13]' on Linux; a GPU is not "
                "needed"
            )
    import triton

    if triton.knobs.runtime.interpret:
        raise ModelError("compile-report: TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")


def _capabilities(archs: list[str], gpus: list[str]) -> list[int]:
    from gpukernels.compile_report import CHIPS, gpu_named

    if "all" in archs:
        return list(CHIPS)
    unknown = [each for each in archs if each.removeprefix("sm_") not in map(str, CHIPS)]
    if unknown:
        raise ModelError(f"--arch must be {', '.join(map(str, CHIPS))} or all, got {unknown[0]}")
    try:
        named = [gpu_named(each).capability for each in gpus]
    except ValueError as fault:
        raise ModelError(f"--gpu: {fault}") from None
    return list(dict.fromkeys([int(each.removeprefix("sm_")) for each in archs] + named)) or [90]


def _steps(names: list[str], dtype: str | None) -> dict[str, Any]:
    """What to record, by name; of a model all steps."""
    from model.device import DTYPES
    from model.workloads import WORKLOADS

    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"--dtype must be {', '.join(DTYPES)}, got {dtype}")
    steps = {}
    for name in names:
        chosen = [each for each in WORKLOADS if name in (each, each.partition("/")[0])]
        if not chosen:
            models = dict.fromkeys(each.partition("/")[0] for each in WORKLOADS)
            kinds = dict.fromkeys(each.partition("/")[2] for each in WORKLOADS)
            raise ModelError(
                f"--workload must be one of {', '.join(models)}, or of their steps /{', /'.join(kinds)}, got {name}"
            )
        steps |= {each: partial(WORKLOADS[each], dtype) for each in chosen}
    return steps


def _document(parts: Iterable[Part]) -> dict[str, Any]:
    from importlib.metadata import version

    from model.workloads import WORKLOADS

    versions = {name: version(name) for name in ("torch", "triton")}
    return {
        "versions": versions,
        "workloads": [
            {
                "workload": name,
                "what": WORKLOADS[name].what,
                "capability": capability,
                "kernels": [row._asdict() for row in rows],
            }
            for name, capability, rows in parts
        ],
    }


def _print(parts: Iterable[Part], console: Console) -> None:
    for part in parts:
        for title, columns, rows in _tables(part):
            table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
            for column in columns:
                justify = "left" if column in ("kernel", *_CODE[5:]) else "right"
                table.add_column(column, justify=justify, overflow="fold")  # nothing is left out of a narrow table
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print()
        for note in _notes(part[2]):
            console.print(note)
        console.print()
    console.print(_LEGEND)


def _page(parts: Iterable[Part]) -> Page:
    page = Page("Compile report")
    page.text(_LEGEND)
    for part in parts:
        for title, columns, rows in _tables(part):
            page.heading(title)
            page.table(columns, rows)
        for note in _notes(part[2]):
            page.text(note)
        if part[2]:
            page.plot(partial(_figure, part), f"{part[0]}: roofline time by kernel")
    return page


def _tables(part: Part) -> Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, columns and cells: what a workload compiles to, and what its launches cost."""
    from gpukernels.compile_report import CHIPS, GPUS
    from model.workloads import WORKLOADS

    name, capability, rows = part
    names = _short_names(rows)
    chip = CHIPS[capability]
    code = [
        (
            label,
            str(row.registers),
            str(row.spilled_bytes),
            f"{row.shared_memory / 1024:.1f}",
            f"{row.resident_blocks} x {row.num_warps} warps ({row.resident_limit})",
            _counts(row.tensor_cores),
            _widths(row.loads),
            _widths(row.stores),
        )
        for label, row in zip(names, rows, strict=True)
    ]
    what = WORKLOADS[name].what
    limit = f"a block may have {chip.shared_memory >> 10} KiB"
    yield f"{name} ({what}) on sm_{capability}, {chip.name}: machine code ({limit})", _CODE, code
    totals = [_cost(label, [row]) for label, row in zip(names, rows, strict=True)]
    if len(rows) > 1:
        totals.append(_cost("all", rows))
    columns = (*_COST, *(f"{gpu} us" for gpu in GPUS))
    yield f"{name} on sm_{capability}: all launches, and their roofline times", columns, totals


def _cost(label: str, rows: list) -> tuple[str, ...]:
    from gpukernels.compile_report import GPUS

    moved, flops = sum(row.read + row.written for row in rows), sum(row.flops for row in rows)
    times = (f"{1e6 * sum(row.roofline[gpu] for row in rows):.1f}" for gpu in GPUS)
    return label, str(sum(row.launches for row in rows)), f"{moved / 1e6:.2f}", f"{flops / 1e9:.3f}", *times


def _short_names(rows: list) -> list[str]:
    """The kernels' names, numbered where one was compiled several times."""
    names = [row.kernel.removeprefix("_").removesuffix("_kernel") for row in rows]
    return [
        f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]  # fmt: skip


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in counted.items()) or "-"


def _widths(counted: dict[str, int]) -> str:
    """ "8 tma, 4x16": the number of accesses, and the bytes of each."""
    return (
        ", ".join(f"{times} tma" if width == "tma" else f"{times}x{width}" for width, times in counted.items()) or "-"
    )


def _notes(rows: list) -> list[str]:
    """What a reader should know of budgets."""
    names = _short_names(rows)
    broken = [f"budget broken: {name}: {text}" for name, row in zip(names, rows, strict=True) for text in row.problems]
    excused = [f"allowed: {name}: {text}" for name, row in zip(names, rows, strict=True) for text in row.excused]
    return broken + excused or [
        "Every budget is kept: spills, shared memory, tensor cores, 16-byte accesses, residency."
    ]


def _figure(part: Part) -> Any:
    from matplotlib.figure import Figure

    from gpukernels.compile_report import GPUS

    name, _, rows = part
    labels, height = _short_names(rows), 0.8 / len(GPUS)
    figure = Figure(figsize=(9, 1 + 0.45 * len(rows)))
    axes = figure.add_subplot()
    for number, gpu in enumerate(GPUS):
        places = [i + number * height for i in range(len(rows))]
        axes.barh(places, [1e6 * row.roofline[gpu] for row in rows], height, label=gpu)
    axes.set_yticks([i + 0.4 for i in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"microseconds at least, all launches of {name}")
    axes.legend()
    return figure
