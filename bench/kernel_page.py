"""The page of `bench.kernels`: speed by shape against rivals, the roofline plot, all figures, machine and versions."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import kernel_tables, targets
from bench.kernel_rows import Roofs
from bench.report import in_words
from bench.rivals import OURS
from gpukernels.compile_report import GPUS
from model.page import Page

if TYPE_CHECKING:  # without it a page has tables only
    from matplotlib.figure import Figure

Row = dict[str, Any]

_OURS = "#d1495b"
_OTHERS = ("#30638e", "#edae49", "#00798c", "#8d6a9f", "#6b705c", "#9a8c98")
_MARKS = {"forward": "o", "backward": "s", "both": "D"}
_STYLE = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "gpukernels",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.edgecolor": "#888", "legend.frameon": False,
}  # fmt: skip


def measured(document: dict[str, Any]) -> Page:
    """The page of a run on a GPU."""
    page = Page(f"Kernels on {document['device']}")
    page.text(in_words(document["machine"]))
    add_measured(page, document)
    return page


def add_measured(page: Page, document: dict[str, Any]) -> None:
    """Targets, plots and tables of a run on a GPU, as sections of a page."""
    rows, roofs = document["rows"], Roofs(**document["roofs"])
    page.text(
        f"Roofs measured first: {roofs.bandwidth / 1e12:.2f} TB/s in a device copy, "
        f"{roofs.tensor_flops / 1e12:.0f} TFLOP/s in a float16 product of 8192 cubed."
    )
    page.heading("Targets")
    page.table(targets.COLUMNS, [targets.cells(each) for each in document["targets"]])
    timed = [row for row in rows if "seconds" in row]
    if timed:
        page.heading("Roofline")
        caption = "Every shape and pass: ours filled, the best rival hollow."
        page.plot(partial(_measured_roofline, timed, roofs), caption, _STYLE)
        page.heading("Speed against rivals")
    for op, group in _by_op(timed).items():
        caption = f"{op}: higher is faster. Cold L2 cache, CUDA graph."
        page.plot(partial(_bars, group), caption, _STYLE)
    page.heading("All figures")
    page.text(kernel_tables.NOTES)
    for table in kernel_tables.measured(rows):
        _table(page, table)


def predicted(document: dict[str, Any]) -> Page:
    """The page of a machine without a GPU."""
    page = Page("Kernels: what GPUs would allow")
    page.text(
        "No CUDA GPU here, so nothing is measured. Launches are those that an H100 gets; bytes are what must move, "
        "each once; times are the least that a GPU's data sheet allows, launch after launch. No kernel is faster."
    )
    page.text(in_words(document["machine"]))
    rows = document["rows"]
    page.heading("Roofline")
    caption = "Every shape and pass, at the roof of the H100 (by data sheet)."
    page.plot(partial(_predicted_roofline, rows), caption, _STYLE)
    page.heading("Least time")
    for op, group in _by_op(rows).items():
        caption = f"{op}: least time by data sheet, lower is faster."
        page.plot(partial(_least_times, group), caption, _STYLE)
    page.heading("All figures")
    for table in kernel_tables.predicted(rows):
        _table(page, table)
    return page


def _by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {op: [row for row in rows if row["op"] == op] for op in dict.fromkeys(row["op"] for row in rows)}


def _table(page: Page, table: kernel_tables.Table) -> None:
    page.text(table.title)
    whole = str.maketrans({" ": "\u00a0", "-": "\u2011"})  # a cell is not broken in two lines
    page.table(table.columns, [[cell.translate(whole) for cell in row] for row in table.rows])
    for note in table.notes:
        page.text(note)


def _roofline(rows: Sequence[Row], roofs: Sequence[tuple[str, float, float]]) -> tuple["Figure", Any]:
    """Axes with a line for each roof, (name, bytes a second, operations a second): no kernel is above its own."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    ax = figure.add_subplot()
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", xlim=(0.05, 8e3))
    low, high = ax.get_xlim()
    for shade, (name, bandwidth, flops) in zip(("#222", "#666", "#999", "#bbb"), roofs, strict=False):
        ends = [low, flops / bandwidth, high], [low * bandwidth / 1e12, flops / 1e12, flops / 1e12]
        label = f"{name}: {bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s"
        ax.plot(*ends, color=shade, label=label, linewidth=1.3)
    lines = ax.legend(loc="lower right", title="roofs", alignment="left")
    ax.add_artist(lines)
    there = [Line2D([], [], marker="o", linestyle="", color=color, label=op) for op, color in _op_colors(rows).items()]
    passes = dict.fromkeys(row["direction"] for row in rows)
    there += [Line2D([], [], marker=_MARKS[one], linestyle="", color="#222", label=one) for one in passes]
    figure.legend(handles=there, loc="outside right center")
    return figure, ax


def _op_colors(rows: Sequence[Row]) -> dict[str, Any]:
    import matplotlib

    ops = dict.fromkeys(row["op"] for row in rows)
    return dict(zip(ops, matplotlib.colormaps["tab20"].colors, strict=False))


def _point(ax: Any, row: Row, seconds: float, color: Any, *, filled: bool = True) -> None:
    at = row["flops"] / row["bytes"], row["flops"] / seconds / 1e12
    face = color if filled else "none"
    ax.plot(*at, _MARKS[row["direction"]], markerfacecolor=face, markeredgecolor=color, markersize=6, alpha=0.85)


def _predicted_roofline(rows: Sequence[Row]) -> "Figure":
    by_speed = sorted(GPUS.values(), key=lambda gpu: -gpu.bandwidth)
    figure, ax = _roofline(rows, [(gpu.name, gpu.bandwidth, gpu.tensor_flops) for gpu in by_speed])
    colors = _op_colors(rows)
    for row in rows:
        _point(ax, row, row["milliseconds"]["H100"] / 1e3, colors[row["op"]])
    return figure


def _measured_roofline(rows: Sequence[Row], roofs: Roofs) -> "Figure":
    rows = [row for row in rows if row["flops"]]
    figure, ax = _roofline(rows, [("measured", roofs.bandwidth, roofs.tensor_flops)])
    colors = _op_colors(rows)
    for row, best in kernel_tables.with_best_rival(rows):
        _point(ax, row, row["seconds"], colors[row["op"]])
        if best is not None:
            _point(ax, best, best["seconds"], colors[row["op"]], filled=False)
    return figure


def _bars(rows: Sequence[Row]) -> "Figure":
    """One op: a panel for every pass, a group of bars for every shape, a bar for every provider."""
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    shapes = list(dict.fromkeys((row["model"], row["shape"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(11, 1.1 + 0.15 * len(shapes) * (len(names) + 1)), layout="constrained")
    colors = {OURS: _OURS} | dict(zip([name for name in names if name != OURS], _OTHERS, strict=False))
    thick = 0.84 / len(names)
    for number, direction in enumerate(directions):
        ax = figure.add_subplot(1, len(directions), number + 1)
        here = [row for row in rows if row["direction"] == direction]
        for place, name in enumerate(names):
            own = {(row["model"], row["shape"]): row["rate"] for row in here if row["provider"] == name}
            at = [i + (place + 0.5) * thick - 0.42 for i, shape in enumerate(shapes) if shape in own]
            bars = ax.barh(at, [own[shape] for shape in shapes if shape in own], thick * 0.9, color=colors[name])
            bars.set_label(name)
            ax.bar_label(bars, fmt=kernel_tables.digits, padding=2, fontsize=7, color="#555")
        labels = [", ".join(shape) for shape in shapes] if not number else [""] * len(shapes)
        ax.set_yticks(range(len(shapes)), labels, fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.margins(x=0.14)
        ax.grid(visible=False, axis="y")
        ax.set_title(direction, fontsize=9, loc="left", color="#555")
        ax.set_xlabel(" or ".join(dict.fromkeys(row["unit"] for row in here)))
        if not number:
            figure.legend(*ax.get_legend_handles_labels(), ncols=len(names), loc="outside upper left")
    return figure


def _least_times(rows: Sequence[Row]) -> "Figure":
    """One op: a panel for every pass, a group of bars for every shape, a bar for every GPU."""
    made = []
    for row in rows:
        for gpu, milliseconds in row["milliseconds"].items():
            made.append(row | {"provider": gpu, "rate": 1e3 * milliseconds, "unit": "microseconds"})
    return _bars(made)
