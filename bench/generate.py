"""Decoding and prefill on the CPU, side by side with the runtimes that are installed.

    python -m bench.generate [--preset gpt2] [--rounds 7] [--compiled]

A model with random weights is written once and loaded by every runtime from the same files. First the
answers: logits against transformers', and the same greedy tokens; a wrong answer gets no speed. Then
prompt 64 + 128 new tokens, end to end, and a prompt of 512, in turn, round by round. Ratios are medians
of the rounds' ratios. The last line is the whole as JSON.
"""

import json
import resource
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

PROMPT, NEW, LONG = 64, 128, 512

_BASELINE = "transformers eager"


def main(
    preset: Annotated[str, typer.Option(help="Which GPT-2.")] = "gpt2",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 7,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile (minutes of warm-up).")] = False,
    float16: Annotated[bool, typer.Option(help="Also ours with float16 weights, and on plain torch.")] = True,
) -> None:
    """Measure, print a table, and end with one line of JSON."""
    ids = np.random.default_rng(0).integers(0, 50000, LONG).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.from_config(preset, seed=0, device="cpu", dtype="float32").save(folder)
        providers = _providers(folder, Path(scratch), compiled, float16)
        errors = _answers(providers, ids)
        right = {name: each for name, each in providers.items() if errors[name] is not None}
        decode = interleaved({name: _decode(each, ids[:PROMPT]) for name, each in right.items()}, rounds=rounds)
        prefill = interleaved({name: _prefill(each, ids) for name, each in right.items()}, rounds=rounds)
    rows = [_row(name, errors[name], decode, prefill) for name in providers]
    show(
        f"{preset}, random weights, batch 1, CPU",
        ("runtime", f"tokens/s ({PROMPT} + {NEW})", "20-80 %", "x eager", f"prefill {LONG}, s", "x eager", "max error"),
        [_cells(row) for row in rows],
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"bench": "generate", "preset": preset, **machine(), "peak_rss_kib": peak, "rows": rows}))


def _providers(folder: Path, scratch: Path, compiled: bool, float16: bool) -> dict[str, object]:
    found: dict[str, object] = {"ours, NumPy float32": Ours(folder, "cpu", "float32")}
    if float16:
        found["ours, NumPy float16"] = Ours(folder, "cpu", "float16")
    if installed("torch"):
        import torch

        if float16:
            found["ours, plain torch float32"] = Ours(folder, torch.device("cpu"), "float32")
        if installed("transformers"):
            found[_BASELINE] = Transformers(folder)
            if compiled:
                found["transformers compiled"] = Transformers(folder, compiled=True)
            if installed("ctranslate2"):
                found["CTranslate2 float32"] = CTranslate2(folder, scratch)
    return found


def _answers(providers: dict[str, object], ids: list[int]) -> dict[str, float | None]:
    """Each one's largest logit error against the baseline (the first without one); None if it is wrong.

    Float32 runtimes must agree to 1e-3 of the largest logit. Weights rounded to float16 move a logit by
    up to 2**-11 a product and layer: 2e-2 of it catches a wrong model and not the rounding.
    """
    judge = providers.get(_BASELINE) or next(iter(providers.values()))
    truth = judge.logits(ids[:PROMPT])
    errors: dict[str, float | None] = {}
    for name, provider in providers.items():
        error = float(np.abs(provider.logits(ids[:PROMPT]) - truth).max())
        share = error / float(np.abs(truth).max())
        errors[name] = error if share <= (2e-2 if "float16" in name else 1e-3) else None
    return errors


def _decode(provider: object, ids: list[int]) -> Callable[[], object]:
    return lambda: provider.generate(ids, NEW)


def _prefill(provider: object, ids: list[int]) -> Callable[[], object]:
    return lambda: provider.prefill(ids)


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
