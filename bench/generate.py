"""Decoding and prefill on the CPU, side by side with the runtimes that are installed.

    python -m bench.generate [--preset gpt2] [--rounds 7] [--compiled]

A model with random weights is written once and loaded by every runtime from the same files, each in a
process of its own. First the answers: logits against transformers'; a wrong one gets no speed. Then prompt
64 + 128 new tokens, end to end, and a prompt of 512 with one token after it, in turn, round by round. Ratios
are medians of the rounds' ratios. The last line is the whole as JSON.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import model
from bench.providers import CTranslate2, Ours, Transformers, installed
from bench.report import machine, show
from bench.timing import Times, interleaved
from bench.worker import Worker

PROMPT, NEW, LONG = 64, 128, 512

_BASELINE = "transformers eager"


def main(
    preset: Annotated[str, typer.Option(help="Which GPT-2.")] = "gpt2",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 7,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile (minutes of warm-up).")] = False,
    others: Annotated[bool, typer.Option(help="Also ours with float16 weights, and on plain torch.")] = True,
) -> None:
    """Measure, print a table, and end with one line of JSON."""
    ids = np.random.default_rng(0).integers(0, 50000, LONG).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.from_config(preset, seed=0, device="cpu", dtype="float32").save(folder)
        workers = _workers(folder, Path(scratch), compiled, others)
        errors = _answers(workers, ids)
        right = {name: each for name, each in workers.items() if errors[name] is not None}
        decode = interleaved(
            {name: _timed(each, "generate", ids[:PROMPT], NEW) for name, each in right.items()}, rounds=rounds
        )
        prefill = interleaved({name: _timed(each, "prefill", ids) for name, each in right.items()}, rounds=rounds)
        for worker in workers.values():
            worker.close()
    rows = [_row(name, errors[name], decode, prefill) for name in workers]
    show(
        f"{preset}, random weights, batch 1, CPU",
        ("runtime", f"tokens/s ({PROMPT} + {NEW})", "20-80 %", "x eager", f"prefill {LONG}, s", "x eager", "max error"),
        [_cells(row) for row in rows],
    )
    print(json.dumps({"bench": "generate", "preset": preset, "rounds": rounds, **machine(), "rows": rows}))


def _workers(folder: Path, scratch: Path, compiled: bool, others: bool) -> dict[str, Worker]:
    made: dict[str, tuple] = {"ours, NumPy float32": (Ours, folder, "cpu", "float32")}
    if others:
        made["ours, NumPy float16"] = (Ours, folder, "cpu", "float16")
    if installed("torch") and installed("transformers"):
        if others:
            made["ours, plain torch float32"] = (Ours, folder, "torch", "float32")
        made[_BASELINE] = (Transformers, folder)
        if compiled:
            made["transformers compiled"] = (Transformers, folder, True)
        if installed("ctranslate2"):
            made["CTranslate2 float32"] = (CTranslate2, folder, scratch)
    return {name: Worker(*each) for name, each in made.items()}


def _answers(workers: dict[str, Worker], ids: list[int]) -> dict[str, float | None]:
    """Each one's largest logit error against the baseline (the first without one); None if it is wrong.

    Float32 runtimes must agree to 1e-3 of the largest logit. Weights rounded to float16 move a logit by
    up to 2**-11 a product and layer: 2e-2 of it catches a wrong model and not the rounding.
    """
    judge = workers.get(_BASELINE) or next(iter(workers.values()))
    truth = judge.call("logits", ids[:PROMPT])[0]
    errors: dict[str, float | None] = {}
    for name, worker in workers.items():
        error = float(np.abs(worker.call("logits", ids[:PROMPT])[0] - truth).max())
        share = error / float(np.abs(truth).max())
        errors[name] = error if share <= (2e-2 if "float16" in name else 1e-3) else None
    return errors


def _timed(worker: Worker, method: str, *arguments: object) -> Callable[[], float]:
    return lambda: worker.call(method, *arguments)[1]


def _row(name: str, error: float | None, decode: dict[str, Times], prefill: dict[str, Times]) -> dict[str, object]:
    row: dict[str, object] = {"runtime": name, "max_logit_error": error}
    if error is None:
        return row
    row["tokens_per_second"] = NEW / decode[name].median
    row["tokens_per_second_20_80"] = [NEW / decode[name].quantile(0.8), NEW / decode[name].quantile(0.2)]
    row["prefill_seconds"] = prefill[name].median
    if _BASELINE in decode:
        row["decode_speedup"] = decode[name].speedup(decode[_BASELINE])
        row["prefill_speedup"] = prefill[name].speedup(prefill[_BASELINE])
    return row


def _cells(row: dict[str, object]) -> tuple[str, ...]:
    if row["max_logit_error"] is None:
        return (row["runtime"], "wrong answer", "", "", "", "", "")
    low, high = row["tokens_per_second_20_80"]
    ratio = "{:.2f}".format
    return (
        row["runtime"],
        f"{row['tokens_per_second']:.1f}",
        f"{low:.1f}-{high:.1f}",
        ratio(row["decode_speedup"]) if "decode_speedup" in row else "",
        f"{row['prefill_seconds']:.3f}",
        ratio(row["prefill_speedup"]) if "prefill_speedup" in row else "",
        f"{row['max_logit_error']:.1e}",
    )


if __name__ == "__main__":
    typer.run(main)
