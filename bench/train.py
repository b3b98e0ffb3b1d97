"""Training side by side with transformers and torch's AdamW: the same weights, batches and order, no dropout.

    python -m bench.train [--rounds 5] [--compiled]

On the CPU the embedded model in float32, batches of 4 x 512 tokens of its own text; on CUDA GPT-2 124M with random
weights in bfloat16, 16 x 1024. Each trainer is in a process of its own. First the answers: the losses of three steps
must be transformers', or there is no speed. Then some steps of each in turn, round by round; ratios are medians of
the rounds' ratios. The last line is the whole as JSON.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

import model
from bench.pretrain import stream, windows
from bench.providers import installed
from bench.report import machine, show
from bench.timing import Times, interleaved
from bench.trainers import Ours, Steps, Transformers
from bench.worker import Worker
from model.device import why_no_cuda
from model.finetune.flops import flops_per_token, peak_flops
from model.memory import human

OURS, _BASELINE = "ours", "transformers eager"
CHECKED = 3  # steps whose losses are compared


class Case(NamedTuple):
    """What is trained, and on what."""

    name: str
    source: str  # the embedded model, or a preset with random weights
    device: str
    dtype: str
    batch: int
    steps: int  # of a round, behind one that is not timed
    tolerance: float  # of a loss, in nats

    def rows(self, lm: model.LanguageModel) -> np.ndarray:
        """(N, T) token ids: enough for a round."""
        count = self.batch * (1 + max(self.steps, CHECKED))
        if lm.tokenizer is not None:
            return windows(stream("train.txt", lm.tokenizer))[:count]
        shape = count, lm.config.n_positions
        return np.random.default_rng(0).integers(0, lm.config.vocab_size, shape, np.int32)


# Float32 losses of 3 to 4 nats differ by their rounding, and by that of the updates before. bfloat16 keeps 8 bits of
# an activation: a mean over 16 thousand tokens is some 1e-3 from float32's, and 2e-2 catches another batch or rate.
CPU = Case("tiny-gpt2, 4 x 512, float32", "tiny-gpt2", "cpu", "float32", 4, 4, 1e-4)
CUDA = Case("gpt2, 16 x 1024, bfloat16", "gpt2", "cuda", "bfloat16", 16, 10, 2e-2)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile (minutes of warm-up).")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="On the CPU, though there is a GPU.")] = False,
) -> None:
    """Measure, print a table, and end with one line of JSON."""
    case = CPU if cpu or why_no_cuda() else CUDA
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make = model.load if case is CPU else model.from_config
        lm = make(case.source, device="cpu", dtype="float32")
        lm.save(folder)
        faults: dict[str, str] = {}
        document = measure(case, lm, _workers(case, folder, compiled, faults), rounds, faults)
    rows = document["rows"]
    show(
        f"Training {case.name}, {case.device}",
        ("trainer", "tokens/s", "20-80 %", "x eager", "of peak", "peak memory", "loss error"),
        [_cells(row) for row in rows],
    )
    print(json.dumps({"bench": "train", "rounds": rounds, **machine(), **document}))


def measure(
    case: Case, lm: model.LanguageModel, workers: dict[str, Worker], rounds: int, faults: dict[str, str] | None = None
) -> dict[str, object]:
    """The figures of every trainer; those whose losses are wrong have no speed, nor those of `faults`, by name."""
    rows, faults = case.rows(lm), {} if faults is None else faults
    answers: dict[str, Steps] = {}
    for name, worker in workers.items():
        try:
            answers[name] = worker.call("train", rows, case.batch, CHECKED)[0]
        except RuntimeError as fault:  # of one trainer; the others can still be measured
            faults[name] = str(fault)
    judge = answers.get(_BASELINE, answers.get(OURS))
    errors = {name: float(np.abs(np.subtract(each.losses, judge.losses)).max()) for name, each in answers.items()}
    right = [name for name, error in errors.items() if error <= case.tolerance]
    found: dict[str, Steps] = {}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            found[name] = workers[name].call("train", rows, case.batch, 1 + case.steps)[0]
            return found[name].seconds

        return run

    failed: dict[str, Exception] = {}
    times = interleaved({name: timed(name) for name in right}, rounds=rounds, faults=failed)
    faults |= {name: str(fault) for name, fault in failed.items()}
    for worker in workers.values():
        worker.close()
    tokens = case.steps * case.batch * rows.shape[1]
    flops, peak = flops_per_token(lm.config, rows.shape[1]), _peak(case)
    share = peak and flops / peak
    made = [_row(name, errors[name], times, tokens, found.get(name), share) for name in errors if name not in faults]
    made += [{"trainer": name, "loss_error": None, "right": False, "fault": said} for name, said in faults.items()]
    return {"case": case.name, "device": case.device, "rows": made}


def _workers(case: Case, folder: Path, compiled: bool, faults: dict[str, str]) -> dict[str, Worker]:
    made: dict[str, tuple] = {OURS: (Ours, folder, case.device, case.dtype)}
    if case.device == "cuda":
        made["ours, a graph"] = (Ours, folder, case.device, case.dtype, True)
    if installed("transformers"):
        made[_BASELINE] = (Transformers, folder, case.device, case.dtype)
        if compiled:
            made["transformers compiled"] = (Transformers, folder, case.device, case.dtype, True)
    workers = {}
    for name, each in made.items():
        try:
            workers[name] = Worker(*each)
        except RuntimeError as fault:
            faults[name] = str(fault)
    return workers


def _peak(case: Case) -> float | None:
    if case.device != "cuda":
        return None
    import torch

    return peak_flops(torch.cuda.get_device_name(), case.dtype)


def _row(
    name: str, error: float, times: dict[str, Times], tokens: int, steps: Steps | None, share: float | None
) -> dict[str, object]:
    row: dict[str, object] = {"trainer": name, "loss_error": error, "right": name in times}
    if steps is None:
        return row
    row["tokens_per_second"] = tokens / times[name].median
    row["tokens_per_second_20_80"] = [tokens / times[name].quantile(0.8), tokens / times[name].quantile(0.2)]
    row["peak_share"] = share and row["tokens_per_second"] * share
    row["peak_memory"] = steps.memory
    if _BASELINE in times:
        row["speedup"] = times[name].speedup(times[_BASELINE])
    return row


def _cells(row: dict[str, object]) -> tuple[str, ...]:
    if "fault" in row:
        return (row["trainer"], row["fault"][:60], "", "", "", "", "")
    error = f"{row['loss_error']:.1e}"
    if not row["right"]:
        return (row["trainer"], "wrong losses", "", "", "", "", error)
    low, high = row["tokens_per_second_20_80"]
    return (
        row["trainer"],
        f"{row['tokens_per_second']:,.0f}",
        f"{low:,.0f}-{high:,.0f}",
        f"{row['speedup']:.2f}" if "speedup" in row else "",
        f"{row['peak_share']:.1%}" if row["peak_share"] else "",
        human(row["peak_memory"]),
        error,
    )


if __name__ == "__main__":
    typer.run(main)
