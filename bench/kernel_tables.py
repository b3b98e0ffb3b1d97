"""The rows of `bench.kernels` as tables: what the terminal, the page and the Markdown file print."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from bench.rivals import OURS
from gpukernels.compile_report import GPUS

Row = dict[str, Any]


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]  # what the numbers in brackets mean


MEASURED = (
    "shape", "pass", "provider", "ms", "20-80 %", "launched, ms", "rate", "of roof", "ours is", "error", "/ bound",
    "memory",
)  # fmt: skip
_WIDE = MEASURED[-2:]
PREDICTED = ("shape", "pass", "launches", "MB", "GFLOP", "limit", *(f"{name}, us" for name in GPUS))

#: What stands under every measured table.
NOTES = (
    "ms: median in a CUDA graph with inputs rotated past three times the L2 cache; * no graph can hold it: with "
    "the host's part. launched: the same calls from Python. of roof: the time that this device's measured copy and "
    "product would take, over the time. ours is: how many times as fast ours is. memory: what the call allocates at "
    "most. error: largest difference from float64 over the largest value; / bound: over what roundings may make it."
)


def measured(rows: Sequence[Row], *, narrow: bool = False) -> list[Table]:
    """A table for every op; `narrow` leaves out the last columns."""
    tables = []
    columns = MEASURED[: -len(_WIDE)] if narrow else MEASURED
    for op, group in _by_op(rows):
        cells, notes, before = [], [], ("", "")
        for row in group:
            now = (_shape(row, group[0]["dtype"]), row["direction"])
            if "fault" in row and row["fault"] not in notes:
                notes.append(row["fault"])
            place = (now[0] if now[0] != before[0] else "", row["direction"] if now != before else "")
            cells.append((*place, *_cells(row, notes))[: len(columns)])
            before = now
        numbered = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
        tables.append(Table(f"{op}, {group[0]['dtype']}", columns, cells, numbered))
    return tables


def _shape(row: Row, dtype: str) -> str:
    """With its dtype, where that is not the one in the table's title."""
    return f"{row['model']}, {row['shape']}" + ("" if row["dtype"] == dtype else f", {row['dtype']}")


def _cells(row: Row, notes: list[str]) -> tuple[str, ...]:
    error, of_bound = (f"{row['error']:.0e}", f"{row['of_bound']:.2f}") if "error" in row else ("", "")
    if "seconds" not in row:
        return (row["provider"], f"[{notes.index(row['fault']) + 1}]", *[""] * 5, error, of_bound, "")
    low, high = (1e3 * each for each in row["seconds_20_80"])
    return (
        row["provider"],
        digits(1e3 * row["seconds"]) + ("" if row["graph"] else " *"),
        f"{digits(low)}-{digits(high)}",
        digits(1e3 * row["launched_seconds"]),
        f"{digits(row['rate'])} {row['unit']}",
        f"{row['of_roof']:.0%}",
        f"{row['speedup_of_ours']:.2f} x" if "speedup_of_ours" in row else "",
        error,
        of_bound,
        f"{digits(row['peak_bytes'] / 1e6)} MB",
    )


def with_best_rival(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Our rows, each with the fastest of the others at its shape and pass."""
    key = itemgetter("op", "model", "shape", "direction")
    best: dict[tuple, Row] = {}
    for row in rows:
        if row["provider"] != OURS and "seconds" in row:
            best[key(row)] = min(best.get(key(row), row), row, key=itemgetter("seconds"))
    return [(row, best.get(key(row))) for row in rows if row["provider"] == OURS]


def predicted(rows: Sequence[Row]) -> list[Table]:
    """A table for every op."""
    tables = []
    for op, group in _by_op(rows):
        cells, before = [], ""
        for row in group:
            shape = _shape(row, group[0]["dtype"])
            times = (digits(1e3 * row["milliseconds"][name]) for name in GPUS)
            work = (digits(row["bytes"] / 1e6), digits(row["flops"] / 1e9), row["limit"])
            cells.append((shape if shape != before else "", row["direction"], str(row["launches"]), *work, *times))
            before = shape
        tables.append(Table(f"{op}, {group[0]['dtype']}", PREDICTED, cells, []))
    return tables


def _by_op(rows: Iterable[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Rows of one op together, ops in their first order."""
    order = {op: i for i, op in enumerate(dict.fromkeys(row["op"] for row in rows))}
    for op, group in groupby(sorted(rows, key=lambda row: order[row["op"]]), key=lambda row: row["op"]):
        yield op, list(group)


def digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    if x == 0:
        return "0"
    return f"{x:.0f}" if abs(x) >= 99.95 else f"{x:#.3g}" if abs(x) >= 1e-3 else f"{x:.1g}"
