"""What decoding is meant to reach, and whether it did: told from the rows of `bench.cuda_generate`.

Set on 2026-11-22 from what rivals and a probe reached on an H100; a figure of another GPU meets only the ratios.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.cuda_generate import LONG, SHORT, Case, Row
from bench.cuda_providers import COMPILED, GRAPH, NUMPY, OURS, TRANSFORMERS

COLUMNS = ("target", "wanted", "measured", "target met?")


class Target(NamedTuple):
    """One number to reach: a figure of a row of ours, or how many times faster than a rival it is: end to end, or,
    with the figure "token_ms", while decoding.
    """

    what: str
    case: Case
    wanted: float
    figure: str = "decode_tokens_per_second"
    rival: str | None = None
    preset: str = "gpt2"


TARGETS = (
    Target("decode, batch 1, context 128, tokens/s", SHORT, 6000),
    Target("decode, batch 1, context 900, tokens/s", LONG, 5000),
    Target("128 + 32 with prefill and sampling, tokens/s", SHORT, 4500, "tokens_per_second"),
    Target("128 + 32 over transformers eager", SHORT, 30, rival=TRANSFORMERS),
    Target("128 + 32 over transformers static + compile", SHORT, 10, rival=COMPILED),
    Target("128 + 32 over torch + CUDA graph", SHORT, 3, rival=GRAPH),
    Target("128 + 32 over our NumPy path, of a 16-core host", SHORT, 50, rival=NUMPY),
    Target("decode, batch 8, context 128, tokens/s", Case(8, 128, 32), 30_000),
    Target("decode, batch 64, context 128, tokens/s", Case(64, 128, 32), 140_000),
    Target("decode, batch 64, over torch + CUDA graph", Case(64, 128, 32), 2, "token_ms", GRAPH),
    Target("GPT-2 XL, decode, batch 1, context 128, tokens/s", SHORT, 750, preset="gpt2-xl"),
)


def compared(rows: Sequence[Row], gpu: str) -> list[dict[str, Any]]:
    """Every target with the figure measured on `gpu` and whether it is met; both None where nothing was."""
    return [_compared(target, rows, gpu) for target in TARGETS]


def _compared(target: Target, rows: Sequence[Row], gpu: str) -> dict[str, Any]:
    found: dict[str, Any] = {"target": target.what, "wanted": target.wanted, "measured": None, "met": None}
    ours = _row(rows, target, OURS, "float16")
    if ours is None or (target.rival is None and "H100" not in gpu):
        return found
    if "token_ms" not in ours:
        return found | {"met": False}  # a wrong answer
    if target.rival is None:
        measured = ours[target.figure]
    elif target.rival == NUMPY:  # not timed in turn with the others
        theirs = _row(rows, target, NUMPY, "float32") or {}
        measured = ours["tokens_per_second"] / theirs["tokens_per_second"] if "token_ms" in theirs else None
    elif target.figure == "token_ms":
        theirs = _row(rows, target, target.rival, "float16") or {}
        measured = theirs["token_ms"] / ours["token_ms"] if "token_ms" in theirs else None
    else:
        measured = ours["over"].get(target.rival)
    return found if measured is None else found | {"measured": measured, "met": measured >= target.wanted}


def _row(rows: Sequence[Row], target: Target, runtime: str, dtype: str) -> Row | None:
    wanted = {"preset": target.preset, "dtype": dtype, "runtime": runtime, **target.case._asdict()}
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def cells(found: dict[str, Any]) -> tuple[str, str, str, str]:
    """As tables print it."""
    measured = "not yet measured" if found["measured"] is None else f"{found['measured']:,.3g}"
    return found["target"], f"{found['wanted']:,g}", measured, {None: "-", True: "yes", False: "no"}[found["met"]]
