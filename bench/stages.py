"""Where the time of a captured decode step goes: each of its stages by the profiler of CUDA, beside its floor.

    python -m bench.stages [--preset gpt2] [--batch 1] [--context 128] [--dtype float16] [--persistent]

Kernels of a step overlap: one starts while another is still at work, and waits. So a stage takes what lies between
its start and the next one's: these add up to the step. The floor is the time of its bytes at the bandwidth of a
copy. The last line is the whole as JSON. Needs a GPU. With `--persistent` the step is one kernel, and one row:
`model.persistent`.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from bench.report import machine, show
from model.device import DTYPES, WIDTHS, why_no_cuda
from model.gpt2_config import PRESETS, GPT2Config

LAYER = {"QKV": "_few", "attention": "_decode", "projection": "_few", "up": "_few", "down": "_few"}
TAIL = {"_norm_forward_kernel": "last norm", "_few_rows_kernel": "head", "_sample_kernel": "sample"}
COLUMNS = ("stage", "launches", "µs each", "µs in a step", "share", "floor, µs", "times the floor")

_STEPS = 50


class Kernel(NamedTuple):
    """One launch as the profiler saw it; microseconds."""

    name: str
    start: float
    end: float


def main(
    preset: Annotated[str, typer.Option(help="Which GPT-2.")] = "gpt2",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    persistent: Annotated[bool, typer.Option("--persistent", help="The step in one launch.")] = False,
) -> None:
    """Profile steps, print a table, and end with one line of JSON."""
    if preset not in PRESETS:
        _refuse(f"{preset!r} is not a preset: there are {', '.join(PRESETS)}")
    if dtype not in DTYPES:
        _refuse(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    config = PRESETS[preset]
    if context + 2 * _STEPS > config.n_positions:
        _refuse(f"context must be {config.n_positions - 2 * _STEPS} at most: {2 * _STEPS} steps follow, got {context}")
    missing = why_no_cuda()
    if missing:
        _refuse(f"stages are timed on a GPU: {missing}")
    import torch

    from bench.cuda_generate import copy_bandwidth

    bandwidth = copy_bandwidth(torch.device("cuda", torch.cuda.current_device()))
    try:
        rows = stages(_profiled(config, batch, context, dtype, persistent), _STEPS, config.n_layer)
    except ValueError as fault:
        _refuse(str(fault))
    moved = stage_bytes(config, dtype, batch=batch, context=context + 3 * _STEPS // 2)
    moved["_persistent_step_kernel"] = sum(moved.values())
    for row in rows:
        if row["stage"] in moved:
            row["floor"] = moved[row["stage"]] / bandwidth * 1e6
    title = f"{preset}, {dtype}, batch {batch}, context {context}: {sum(row['step'] for row in rows):.1f} µs a step"
    show(f"{torch.cuda.get_device_name()}: {title}", COLUMNS, [_cells(row) for row in rows])
    case = {"preset": preset, "dtype": dtype, "batch": batch, "context": context, "bandwidth": bandwidth}
    case["persistent"] = persistent
    print(json.dumps({"bench": "stages", **case, **machine(), "rows": rows}))


def _profiled(config: GPT2Config, batch: int, context: int, dtype: str, persistent: bool) -> list[Kernel]:
    """Every kernel of so many steps. Raises ValueError for a model without a persistent step."""
    import torch

    from bench.cuda_providers import random_model
    from model.graph import GraphDecoder
    from model.persistent import PersistentDecoder
    from model.sampling import Sampling

    lm = random_model(config, torch.device("cuda"), dtype)
    kind = PersistentDecoder if persistent else GraphDecoder
    decoder = kind(lm.parameters, config, rows=batch, capacity=config.n_positions)
    for row in range(batch):
        decoder.start(row, [(row + i) % config.vocab_size for i in range(context)], Sampling())
    for _ in range(_STEPS):
        decoder.step(batch)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            decoder.step(batch)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return kernels(json.loads(trace.read_text(encoding="utf-8")))


def kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """The kernels of a trace in the order of their starts."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    return sorted((Kernel(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events), key=lambda kernel: kernel.start)


def stages(found: Sequence[Kernel], steps: int, layers: int) -> list[dict[str, Any]]:
    """A row for each stage, or kernel where a layer is not LAYER: launches, microseconds of each and in a step.

    Medians over the steps.

    Raises:
        ValueError: not the same kernels in every step.
    """
    count = len(found) // steps
    each = [found[start : start + count] for start in range(0, count * steps, count)] if count else []
    names = [kernel.name for kernel in each[0]] if each else []
    if not names or len(found) % steps or any([kernel.name for kernel in step] != names for step in each):
        raise ValueError(f"the profiler saw {len(found)} kernels in {steps} steps, which are not so many equal ones")
    # A stage ends where the next one starts, and the last where its kernel does.
    times = np.array([np.diff([*(kernel.start for kernel in step), step[-1].end]) for step in each])
    pace, rows = np.median(times, 0), {}
    labels, starts = list(LAYER) * layers, list(LAYER.values()) * layers
    layered = len(names) > len(labels) and all(map(str.startswith, names, starts))
    for place, (name, time) in enumerate(zip(names, pace, strict=True)):
        stage = name
        if layered:
            stage = labels[place] if place < len(labels) else TAIL.get(name, name)
        row = rows.setdefault(stage, {"stage": stage, "launches": 0, "step": 0.0})
        row["launches"] += 1
        row["step"] += float(time)
    total = sum(row["step"] for row in rows.values())
    return [row | {"each": row["step"] / row["launches"], "share": row["step"] / total} for row in rows.values()]


def stage_bytes(config: GPT2Config, dtype: str, *, batch: int, context: int) -> dict[str, int]:
    """What each stage must move in a step: weights, or keys and values."""
    square = config.n_layer * config.n_embd**2
    hidden = config.n_layer * config.n_embd * config.feed_forward_width
    elements = {"QKV": 3 * square, "projection": square, "up": hidden, "down": hidden}
    elements["attention"] = 2 * config.n_layer * batch * context * config.n_embd
    elements["head"] = config.vocab_size * config.n_embd
    return {stage: count * WIDTHS[dtype] for stage, count in elements.items()}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    floor = row.get("floor")
    return (
        row["stage"],
        str(row["launches"]),
        f"{row['each']:.2f}",
        f"{row['step']:.1f}",
        f"{row['share']:.0%}",
        "" if floor is None else f"{floor:.1f}",
        "" if floor is None else f"{row['step'] / floor:.1f}",
    )


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
