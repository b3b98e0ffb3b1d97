"""`gpukernels check`: would this model load, and what would its weights lose in fewer bits?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from gpukernels.cast import Losses
from model import check as preflight
from model.audit import DTYPES, Audit, audit
from model.cli.options import CacheDir, Json, Local, Model, Refresh, Revision
from model.cli.outline import outlined
from model.device import choose_device
from model.errors import ModelError, RepositoryError
from model.memory import human, likely_place, predict


def check(
    model: Model,
    with_audit: Annotated[
        bool, typer.Option("--audit", help="Read the weights, and count what a cast to --dtype loses.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the audit: float16 (the default) or bfloat16.", show_default=False)
    ] = None,
    fail_on_overflow: Annotated[
        bool, typer.Option("--fail-on-overflow", help="Exit code 1 where the audit's cast makes a value infinite.")
    ] = False,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
) -> None:
    """Check MODEL from its JSON and headers; exit code 1 if it would not load. Only --audit reads weights."""
    if not with_audit and (dtype is not None or fail_on_overflow):
        raise ModelError("--dtype and --fail-on-overflow are the audit's: give --audit too")
    dtype = DTYPES[0] if dtype is None else dtype
    if dtype not in DTYPES:
        raise ModelError(f"--dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    cache = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "refresh": refresh}
    try:
        with outlined(model, weights=with_audit, **cache) as (path, named):
            report, source = preflight.check(path, headers_only=not with_audit), named(str(path))
    except RepositoryError as fault:
        report, source, named = preflight.Report(Path(model), problems=fault.problems), model, str
    planned = report.plan
    memory = (
        []
        if planned is None
        else [predict(planned.config, dtype, likely_place(), head=planned.own_head) for dtype in ("float32", "float16")]
    )
    found = audit(planned, choose_device("auto"), dtype) if with_audit and not report.problems else None
    if as_json:
        document = {
            "model": model,
            "source": source,
            "ok": not report.problems,
            "problems": list(map(named, report.problems)),
            "notices": list(map(named, report.notices)),
            "memory": {each.dtype: each.peak for each in memory},
        }
        print(json.dumps(document | ({"audit": _document(found)} if found else {})))
    else:
        for problem in report.problems:
            print(f"problem: {named(problem)}")
        for notice in report.notices:
            print(f"note: {named(notice)}")
        if not report.problems:
            sizes = ", ".join(f"{human(each.peak)} as {each.dtype}" for each in memory)
            print(f"ok: {source}: {len(planned.entries)} tensors fit the config; one sequence takes {sizes}")
        if found:
            _show(found)
    if report.problems or (fail_on_overflow and found and found.total.overflowed):
        raise typer.Exit(1)


def _document(found: Audit) -> dict:
    filled = found.filled
    return {
        "dtype": found.dtype,
        "tensors": {name: asdict(lost) for name, lost in found.losses.items()},
        "total": asdict(found.total),
        "logits": found.logits and asdict(found.logits),
        "runs": found.runs,
        "load": {
            "bytes": filled.nbytes,
            "seconds": filled.seconds,
            "gigabytes_per_second": filled.gigabytes_per_second,
        },
    }


_COLUMNS = ("values", "not finite", "overflow", "underflow", "subnormal", "relative error")


def _show(found: Audit) -> None:
    console, total = Console(highlight=False, width=120), found.total
    worth_a_row = {name: lost for name, lost in found.losses.items() if lost.any}
    table = Table(Column("tensor", overflow="fold"), title=f"cast to {found.dtype}", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name, lost in worth_a_row.items():
        table.add_row(name, *_cells(lost))
    quiet = [lost for lost in found.losses.values() if not lost.any]
    if worth_a_row and quiet:
        table.add_row(f"{len(quiet)} others", *_cells(sum(quiet, Losses())))
    table.add_section()
    table.add_row(f"all {len(found.losses)}", *_cells(total))
    console.print(table)
    console.print(
        "overflow: finite values that become infinite; underflow: values that become 0; subnormal: values that keep "
        "fewer bits; relative error: the largest of values in the format's normal range",
        soft_wrap=True,
    )
    if found.logits is None:
        console.print("logits: not finite in float32 already; nothing to compare")
    elif found.logits.nonfinite:
        console.print(
            f"logits over {found.logits.tokens} tokens: {found.logits.nonfinite} are not finite; {found.runs}"
        )
    else:
        change = found.logits
        console.print(
            f"logits over {change.tokens} tokens, against float32: at most {change.absolute:.2g} off, "
            f"{change.relative:.2g} of the largest; the likeliest token is the same at {change.same_choice:.0%} "
            f"({found.runs})",
            soft_wrap=True,
        )
    filled = found.filled
    console.print(
        f"read and counted {human(filled.nbytes)} at {filled.gigabytes_per_second:.3g} GB/s: {filled.way}",
        soft_wrap=True,
    )


def _cells(lost: Losses) -> tuple[str, ...]:
    counts = (lost.values, lost.nonfinite, lost.overflowed, lost.underflowed, lost.subnormal)
    return (*(f"{count:,}" for count in counts), f"{lost.error:.2g}")
