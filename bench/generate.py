"""Decoding and prefill, side by side with the runtimes that are installed; on a GPU where there is one.

    python -m bench.generate [--preset gpt2-xl] [--case 8x128+32] [--compiled] [--json FILE] [--html FILE]
    python -m bench.generate --device cpu [--preset tinyllama-1.1b] [--rounds 7] [--compiled]
    python -m bench.generate --card

On the CPU: a model with random weights is written once and loaded by every runtime from the same files, each in a
process of its own. First the answers: logits against transformers'; a wrong one gets no speed. Then prompt
64 + 128 new tokens, end to end, and a prompt of 512 with one token after it, in turn, round by round. Ratios
are medians of the rounds' ratios. The last line is the whole as JSON.

On a GPU: see `bench.cuda_generate`; first what a step must move (`--card`: only that).
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import model
from bench.output import require_writable
from bench.providers import CTranslate2, Ours, Transformers, installed
from bench.report import machine, show, write_json
from bench.timing import Times, interleaved
from bench.worker import Worker
from model.config import PRESETS
from model.device import why_no_cuda
from model.gpt2_config import PRESETS as GPT2_PRESETS

PROMPT, NEW, LONG = 64, 128, 512

_BASELINE = "transformers eager"
_COLUMNS = (
    "runtime",
    f"tokens/s ({PROMPT} + {NEW})",
    "20-80 %",
    "x eager",
    f"prefill {LONG}, s",
    "x eager",
    "max error",
)
_CARD = ((1, 128), (1, 900), (8, 128), (64, 128), (64, 900))  # batch, context


def main(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="A shape, as llama-3.2-1b; default gpt2, on a GPU gpt2-xl too. May be repeated there."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each is timed: 7, on a GPU 5.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile (minutes of warm-up).")] = False,
    others: Annotated[
        bool | None, typer.Option(help="CPU: also ours with float16 weights and on plain torch; default yes.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(metavar="BATCHxPROMPT+NEW", help="GPU: only this, as 8x128+32; may be repeated.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="GPU: float16, bfloat16 or float32; default float16.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, on a GPU case by case.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    persistent: Annotated[
        bool, typer.Option("--persistent", help="GPU: also our step in one launch, where the model has one.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="Only what a step must move, and what that allows.")] = False,
) -> None:
    """Measure, print a table, and end with one line of JSON."""
    for name in preset or ():
        if name not in PRESETS:
            _refuse(f"{name!r} is not a preset: there are {', '.join(PRESETS)}")
    try:
        require_writable(json_file, html)
    except ValueError as fault:
        _refuse(str(fault))
    if dtype not in (None, "float16", "bfloat16", "float32"):
        _refuse(f"dtype must be float16, bfloat16 or float32, got {dtype!r}")
    if device not in ("auto", "cpu", "cuda"):
        _refuse(f"device must be auto, cpu or cuda, got {device!r}")
    if card:
        from bench.cost_card import card as table
        from bench.cost_card import listed_bandwidths

        stored = dtype or "float16"
        show(f"A step in {stored}", *table(preset or GPT2_PRESETS, stored, _CARD, listed_bandwidths()))
        return
    missing = why_no_cuda() if device != "cpu" else "the CPU was asked for"
    if device == "cuda" and missing:
        _refuse(f"there is no CUDA here: {missing}")
    if missing is None:
        from bench.cuda_generate import Case

        try:
            cases = [Case.read(each) for each in case or ()]
            for each in cases:
                each.check(PRESETS[name] for name in preset or ("gpt2",))
        except ValueError as fault:
            _refuse(str(fault))
        if others is not None:
            _refuse("--others and --no-others are for the CPU")
        presets = preset or ["gpt2", "gpt2-xl"]
        runs = {"compiled": compiled, "persistent": persistent}
        document = _on_cuda(presets, cases, dtype or "float16", rounds or 5, runs, json_file, html)
    else:
        for name, given in (("--case", case), ("--dtype", dtype), ("--persistent", persistent)):
            if given:
                _refuse(f"{name} is for a GPU: {missing}")
        if preset and len(preset) > 1:
            _refuse("on the CPU one preset is measured at a time")
        document = _on_cpu((preset or ["gpt2"])[0], rounds or 7, compiled, others is not False, html)
        _keep(document, json_file)
    print(json.dumps(document))
    ours = [row for row in document["rows"] if row["runtime"].startswith("ours")]
    if "device" in document and not all("token_ms" in row for row in ours):
        sys.exit(1)  # a wrong answer, or none


def _keep(document: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_json(path, document)


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _on_cuda(
    presets: list[str],
    cases: list,
    dtype: str,
    rounds: int,
    runs: dict[str, bool],
    json_file: Path | None,
    html: Path | None,
) -> dict[str, Any]:
    """All cases of the first preset, or those asked for; of the others by default the shortest.

    runs: the runtimes that are there only where they are asked for.
    """
    import torch

    from bench import cuda_generate, generate_page, generate_targets
    from bench.cost_card import card

    here = torch.device("cuda", torch.cuda.current_device())
    name, bandwidth = torch.cuda.get_device_name(here), cuda_generate.copy_bandwidth(here)
    torch.cuda.empty_cache()  # the rest is that of other processes
    document: dict[str, Any] = {"bench": "generate", "device": name, "dtype": dtype, "rounds": rounds, **machine()}
    document |= {
        "bandwidth": bandwidth,
        "card": card(presets, dtype, _CARD, {f"{bandwidth / 1e12:.2f} TB/s": bandwidth}),
    }
    document |= {"rows": [], "targets": generate_targets.compared([], name)}
    show(f"{name}: what a step must move, at the bandwidth of a copy", *document["card"])
    for number, preset in enumerate(presets):
        chosen = cases or (cuda_generate.CASES if number == 0 else (cuda_generate.SHORT,))
        options = {"device": str(here), "dtype": dtype, "rounds": rounds, "bandwidth": bandwidth, **runs}
        options["numpy"] = number == 0 and not cases
        for rows in cuda_generate.measure(preset, PRESETS[preset], chosen, **options):
            document["rows"] += rows
            document["targets"] = generate_targets.compared(document["rows"], name)
            _keep(document, json_file)
            for title, cells in generate_page.tables(rows).items():
                show(title, generate_page.COLUMNS, cells)
    show("Targets", generate_targets.COLUMNS, [generate_targets.cells(each) for each in document["targets"]])
    if html is not None:
        generate_page.page(document).write(html)
    return document


def _on_cpu(preset: str, rounds: int, compiled: bool, others: bool, html: Path | None) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, min(50000, PRESETS[preset].vocab_size), LONG).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.from_config(preset, seed=0, device="cpu", dtype="float32").save(folder)
        workers = _workers(preset, folder, Path(scratch), compiled, others)
        errors = _answers(workers, ids)
        right = {name: each for name, each in workers.items() if errors[name] is not None}
        decode = interleaved(
            {name: _timed(each, "generate", ids[:PROMPT], NEW) for name, each in right.items()}, rounds=rounds
        )
        prefill = interleaved({name: _timed(each, "prefill", ids) for name, each in right.items()}, rounds=rounds)
        for worker in workers.values():
            worker.close()
    rows = [_row(name, errors[name], decode, prefill) for name in workers]
    title, cells = f"{preset}, random weights, batch 1, CPU", [_cells(row) for row in rows]
    show(title, _COLUMNS, cells)
    if html is not None:
        from model.page import Page

        page = Page(title)
        page.table(_COLUMNS, cells)
        page.write(html)
    return {"bench": "generate", "preset": preset, "rounds": rounds, **machine(), "rows": rows}


def _workers(preset: str, folder: Path, scratch: Path, compiled: bool, others: bool) -> dict[str, Worker]:
    made: dict[str, tuple] = {"ours, NumPy float32": (Ours, folder, "cpu", "float32")}
    if others:
        made["ours, NumPy float16"] = (Ours, folder, "cpu", "float16")
    if installed("torch") and installed("transformers"):
        if others:
            made["ours, plain torch float32"] = (Ours, folder, "torch", "float32")
        made[_BASELINE] = (Transformers, folder)
        if compiled:
            made["transformers compiled"] = (Transformers, folder, True)
        if installed("ctranslate2") and preset in GPT2_PRESETS:  # of others its converter wants the tokenizer
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
