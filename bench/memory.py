"""What a model takes in float16 and in float32, and what loading it costs, beside transformers' own.

    python -m bench.memory [--preset gpt2 ...] [--all] [--json FILE] [--html FILE]

The footprint of each preset is predicted from its shape: weights, keys and values, and all of it. Then a model
with random float32 weights is written to a temporary folder once and loaded by every runtime in both dtypes, each
in a new process, from files that the system has in its cache. First the answers: logits of 8 tokens
against ours in float32; a wrong one gets no figures. The last line is the whole as JSON.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import model
from bench.loading import Ours, Transformers
from bench.output import require_writable
from bench.providers import installed
from bench.report import machine, show, write_json
from bench.worker import Worker
from model.device import choose_device
from model.gpt2_config import PRESETS
from model.memory import human, place_of, predict, weight_bytes
from model.page import Page

DTYPES = ("float32", "float16")
RUNTIMES = {"ours": Ours, "transformers": Transformers}

#: Of the largest logit: weights rounded to float16 move a logit by up to 2^-11 a product and layer, and float16
#: activations, on a GPU, by as much again. A wrong model is off by the whole.
_TOLERANCE = {"float32": 1e-3, "float16": 4e-2}


def main(
    preset: Annotated[
        list[str] | None, typer.Option(help="Which GPT-2; may be given again. Default gpt2 and gpt2-medium.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="GPT-2 small to XL.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is loaded; the quickest counts.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also a page with plots.")] = None,
) -> None:
    """Measure, print tables, and end with one line of JSON."""
    names = list(PRESETS) if every else preset or ["gpt2", "gpt2-medium"]
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        raise typer.BadParameter(f"--preset must be one of {', '.join(PRESETS)}, got {unknown[0]!r}")
    try:
        require_writable(json_file, html)
        place = choose_device(device)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None
    footprints = [_footprint(name, dtype, place_of(place)) for name in PRESETS for dtype in DTYPES]
    columns = ("model", "dtype", "weights", "KV cache", "peak", "against float32")
    show(f"predicted, one row of 1024 tokens, {place.name}", columns, [_footprint_cells(each) for each in footprints])
    loads: list[dict[str, Any]] = []
    for name in names:
        loads += _loads(name, place.name, rounds)
    columns = ("model", "dtype", "runtime", "load, s", "GB/s", "first logits, s", "peak", "of the weights", "held")
    show(f"loading float32 files, {place.name}, from the system's cache", columns, [_load_cells(row) for row in loads])
    document = {"bench": "memory", "device": place.name, "rounds": rounds, **machine()}
    document |= {"footprints": footprints, "loads": loads}
    if json_file is not None:
        write_json(json_file, document)
    if html is not None:
        _page(document).write(html)
    print(json.dumps(document))


def _footprint(name: str, dtype: str, place: str) -> dict[str, Any]:
    ledger, full = predict(PRESETS[name], dtype, place), predict(PRESETS[name], "float32", place)
    numbers = {"weights": ledger.weights, "kv_cache": ledger.kv_cache, "peak": ledger.peak}
    return {"model": name, "dtype": dtype, **numbers, "share": ledger.peak / full.peak}


def _footprint_cells(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = [human(row[name]) for name in ("weights", "kv_cache", "peak")]
    return (row["model"], row["dtype"], *sizes, f"{row['share']:.0%}")


def _loads(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each dtype and runtime; the files are gone after it."""
    config = PRESETS[name]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 8).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        needed, free = weight_bytes(config, "float32"), shutil.disk_usage(scratch).free
        if needed > free:
            raise typer.BadParameter(f"{name} takes {human(needed)} of disk, and {human(free)} are free in {scratch}")
        folder = Path(scratch) / name
        model.from_config(name, seed=0, device="cpu", dtype="float32").save(folder)
        truth, rows = None, []
        for dtype in DTYPES:
            for runtime, make in RUNTIMES.items():
                if runtime == "transformers" and not (installed("torch") and installed("transformers")):
                    continue
                try:
                    worker = Worker(make, folder, device, dtype)
                    found = worker.call("load", ids, rounds)[0]
                except RuntimeError as fault:  # of one runtime; the others can still be measured
                    row = {"model": name, "dtype": dtype, "runtime": runtime, "max_logit_error": None}
                    rows.append(row | {"wrong": True, "fault": str(fault)})
                    continue
                worker.close()
                truth = found["logits"] if truth is None else truth
                rows.append(_row(name, dtype, runtime, found, truth))
    return rows


def _row(name: str, dtype: str, runtime: str, found: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    logits = found.pop("logits")
    error = float(np.abs(logits - truth).max())
    row = {"model": name, "dtype": dtype, "runtime": runtime, "max_logit_error": error}
    if not error <= _TOLERANCE[dtype] * float(np.abs(truth).max()):
        return row | {"wrong": True}
    rate = weight_bytes(PRESETS[name], "float32") / found["seconds"] / 1e9  # of the file's bytes
    return row | {"wrong": False, **found, "gigabytes_per_second": rate, "weights": weight_bytes(PRESETS[name], dtype)}


def _load_cells(row: dict[str, Any]) -> tuple[str, ...]:
    head = (row["model"], row["dtype"], row["runtime"])
    if row["wrong"]:
        return (*head, row.get("fault", "wrong answer")[:60], "", "", "", "", "")
    return (
        *head,
        f"{row['seconds']:.2f}",
        f"{row['gigabytes_per_second']:.2f}",
        f"{row['seconds_to_logits']:.2f}",
        human(row["peak"]),
        f"{row['peak'] / row['weights']:.2f}",
        human(row["held"]),
    )


def _page(document: dict[str, Any]) -> Page:
    page = Page("Memory: float16 against float32, and loading")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    page.text(
        f"{document['date']}, {document['device']}, {document['cores']} cores of {document['processor']}; {versions}"
    )
    page.heading("Footprint, predicted, one row of 1024 tokens")
    rows = document["footprints"]
    page.table(
        ("model", "dtype", "weights", "KV cache", "peak", "against float32"), [_footprint_cells(row) for row in rows]
    )
    labels = [row["model"] for row in rows[:: len(DTYPES)]]
    peaks = {dtype: [row["peak"] / 1e9 for row in rows if row["dtype"] == dtype] for dtype in DTYPES}
    page.plot(partial(_bars, labels, peaks, "GB"), "All of it: weights, keys and values, activations, workspace.")
    page.heading("Loading")
    loads = [row for row in document["loads"] if not row["wrong"]]
    columns = ("model", "dtype", "runtime", "load, s", "GB/s", "first logits, s", "peak", "of the weights", "held")
    page.table(columns, [_load_cells(row) for row in document["loads"]])
    labels = list(dict.fromkeys(f"{row['model']}\n{row['dtype']}" for row in loads))
    for field, unit, caption in (
        ("seconds_to_logits", "s", "From the call to the first logits; the quickest of the rounds."),
        ("peak", "GB", "The most memory meanwhile."),
    ):
        by_label = {(row["runtime"], f"{row['model']}\n{row['dtype']}"): row[field] for row in loads}
        scale = 1e9 if unit == "GB" else 1
        series = {name: [by_label.get((name, label), 0) / scale for label in labels] for name in RUNTIMES}
        drawn = {name: values for name, values in series.items() if any(values)}
        page.plot(partial(_bars, labels, drawn, unit), caption)
    return page


def _bars(labels: list[str], series: dict[str, list[float]], unit: str) -> Any:
    """Groups of bars, one for each label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5))
    axes = figure.subplots()
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        drawn = axes.bar([at + number * width for at in range(len(labels))], values, width, label=name)
        axes.bar_label(drawn, fmt="%.2g", fontsize=7)
    axes.set_xticks([at + width * (len(series) - 1) / 2 for at in range(len(labels))], labels)
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    typer.run(main)
