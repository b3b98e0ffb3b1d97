"""The rows of `bench.kernels` as tables: what the terminal, the page and the Markdown file print."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from gpukernels.compile_report import GPUS

Row = dict[str, Any]


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


MEASURED = (
    "shape", "pass", "provider", "ms", "20-80 %", "launched, ms", "rate", "of roof", "ours is", "memory", "error",
    "/ bound",
)  # fmt: skip
PREDICTED = ("shape", "pass", "launches", "MB", "GFLOP", "limit", *(f"{name}, us" for name in GPUS))

#: What stands under every measured table.
NOTES = (
    "ms: median in a CUDA graph with inputs rotated past three times the L2 cache; * no graph can hold it: with "
    "the host's part. launched: the same calls from Python. of roof: the time that this device's measured copy and "
    "product would take, over the time. ours is: how many times as fast ours is. memory: what the call allocates at "
    "most. error: largest difference from float64 over the largest value; / bound: over what roundings may make it."
)


def measured(rows: Sequence[Row]) -> list[Table]:
    """A table for every op."""
    tables = []
    for op, group in _by_op(rows):
        cells, before = [], ("", "")
        for row in group:
            shape = f"{row['model']}, {row['shape']}"
            now = (shape, row["direction"])
            cells.append((shape if shape != before[0] else "", row["direction"] if now != before else "", *_cells(row)))
            before = now
        tables.append(Table(f"{op}, {group[0]['dtype']}", MEASURED, cells))
    return tables


def _cells(row: Row) -> tuple[str, ...]:
    error = (f"{row['error']:.0e}", f"{row['of_bound']:.2f}") if "error" in row else ("", "")
    if "seconds" not in row:
        return (row["provider"], row.get("fault", ""), *[""] * 6, *error)
    low, high = (1e3 * each for each in row["seconds_20_80"])
    return (
        row["provider"],
        digits(1e3 * row["seconds"]) + ("" if row["graph"] else " *"),
        f"{digits(low)}-{digits(high)}",
        digits(1e3 * row["launched_seconds"]),
        f"{digits(row['rate'])} {row['unit']}",
        f"{row['of_roof']:.0%}",
        f"{row['speedup_of_ours']:.2f} x" if "speedup_of_ours" in row else "",
        f"{digits(row['peak_bytes'] / 1e6)} MB",
        *error,
    )


def predicted(rows: Sequence[Row]) -> list[Table]:
    """A table for every op."""
    tables = []
    for op, group in _by_op(rows):
        cells, before = [], ""
        for row in group:
            shape = f"{row['model']}, {row['shape']}"
            times = (digits(1e3 * row["milliseconds"][name]) for name in GPUS)
            work = (digits(row["bytes"] / 1e6), digits(row["flops"] / 1e9), row["limit"])
            cells.append((shape if shape != before else "", row["direction"], str(row["launches"]), *work, *times))
            before = shape
        tables.append(Table(f"{op}, {group[0]['dtype']}", PREDICTED, cells))
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
