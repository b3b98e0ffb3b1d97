"""What the kernels are meant to reach, and whether they did: told from the rows of `bench.kernels`.

Set on 2026-11-22 from what rivals and small probe kernels reached on an H100.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.rivals import OURS, TORCH

Row = dict[str, Any]

NOT_MEASURED = "not yet measured"


class Target(NamedTuple):
    """One number to reach."""

    what: str
    op: str
    direction: str
    at: Callable[[Row], bool]  # the shapes that count; the worst of them is the figure
    measure: str  # "speedup": ours over the rival; "rate", "milliseconds" and "memory": ours, or over the rival
    wanted: float
    most: bool = False  # the figure is to be that at most, not at least
    rival: str = TORCH

    @property
    def absolute(self) -> bool:
        """Whether it was set for an H100 and says nothing of another GPU."""
        return self.measure in ("rate", "milliseconds")


def _shape(*shapes: str) -> Callable[[Row], bool]:
    return lambda row: row["model"] == "GPT-2" and row["shape"] in shapes


def _model(row: Row) -> bool:
    return row["model"] == "GPT-2"


_LOSS = "8192 x 768 -> 50304"


def _attention(what: str, direction: str, rival: str, wanted: float) -> Target:
    return Target(
        f"attention {direction}, D 64, over {what}", "attention", direction, _model, "speedup", wanted, rival=rival
    )


TARGETS = (
    _attention("cuDNN", "forward", "SDPA cuDNN", 1.05),
    _attention("cuDNN", "backward", "SDPA cuDNN", 1.05),
    _attention("flash", "backward", "SDPA flash", 1.5),
    Target("layer norm forward, 32768 x 768, TB/s", "layer_norm", "forward", _shape("32768 x 768"), "rate", 2.6),
    Target("layer norm backward, 32768 x 768, TB/s", "layer_norm", "backward", _shape("32768 x 768"), "rate", 1.8),
    Target("linear + bias + GELU, over cuBLAS + GELU", "linear_gelu", "forward", _model, "speedup", 1.3),
    Target("float16 product, over cuBLAS", "linear", "forward", _model, "speedup", 0.95),
    Target("few-row product, over cuBLAS", "few_rows", "forward", _model, "speedup", 2.0),
    Target(
        "cross entropy with gradient, 8192 x 50304, ms",
        "cross_entropy", "both", _shape("8192 x 50304"), "milliseconds", 0.75, most=True,
    ),
    Target(
        "linear + cross entropy with gradients, time over torch's",
        "linear_cross_entropy", "both", _shape(_LOSS), "time", 1.1, most=True,
    ),
    Target(
        "linear + cross entropy with gradients, memory over torch's",
        "linear_cross_entropy", "both", _shape(_LOSS), "memory", 0.25, most=True,
    ),
    Target("AdamW, 124 M parameters, ms", "adamw", "forward", _model, "milliseconds", 1.18, most=True),
)  # fmt: skip


def compared(rows: Sequence[Row], gpu: str) -> list[Row]:
    """Every target with the figure measured on `gpu` and whether it is met; both None where nothing was."""
    return [_compared(target, rows, gpu) for target in TARGETS]


def _compared(target: Target, rows: Sequence[Row], gpu: str) -> Row:
    sign = "at most" if target.most else "at least"
    found: Row = {"target": target.what, "wanted": f"{sign} {target.wanted:g}", "measured": None, "met": None}
    if target.absolute and "H100" not in gpu:
        return found | {"wanted": f"{sign} {target.wanted:g} on an H100"}
    here = [row for row in rows if (row["op"], row["direction"]) == (target.op, target.direction) and target.at(row)]
    ours = {row["shape"]: row for row in here if row["provider"] == OURS}
    theirs = {row["shape"]: row for row in here if row["provider"] == target.rival}
    figures = []
    for shape, row in ours.items():
        if "fault" in row:
            return found | {"met": False}
        figure = _figure(target, row, theirs.get(shape, {}))
        if figure is not None:
            figures.append(figure)
    if not figures:
        return found
    worst = max(figures) if target.most else min(figures)
    return found | {"measured": worst, "met": worst <= target.wanted if target.most else worst >= target.wanted}


def _figure(target: Target, ours: Row, rival: Row) -> float | None:
    if target.measure == "rate":
        return ours["rate"]
    if target.measure == "milliseconds":
        return ours["seconds"] * 1e3
    if "seconds" not in rival:
        return None
    if target.measure == "memory":
        return ours["peak_bytes"] / rival["peak_bytes"] if rival["peak_bytes"] else None
    ratio = rival["seconds"] / ours["seconds"]  # where there are no ratios round by round
    ratio = rival.get("speedup_of_ours", ratio)
    return ratio if target.measure == "speedup" else 1 / ratio


def cells(found: Row) -> tuple[str, str, str, str]:
    """Target, wanted, measured, "target met?", as tables print them."""
    measured = NOT_MEASURED if found["measured"] is None else f"{found['measured']:.3g}"
    met = {None: "-", True: "yes", False: "no"}[found["met"]]
    if found["met"] is False and found["measured"] is None:
        measured = "no right answer"
    return found["target"], found["wanted"], measured, met


COLUMNS = ("target", "wanted", "measured", "target met?")
