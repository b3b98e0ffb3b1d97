"""`gpukernels info`: what a model is, and what it takes."""

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.architecture import architecture
from model.cli.options import CacheDir, Json, Local, Model, Refresh, Revision
from model.cli.outline import outlined
from model.config import PRESETS
from model.load import plan
from model.memory import human, likely_place, parameter_count, predict


def info(
    model: Model,
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor."),
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
) -> None:
    """Show config, parameters, and memory of MODEL; a preset (gpt2, gpt2-medium, ...) needs no files."""
    if model in PRESETS and not Path(model).exists():
        config, source, stored, notices = PRESETS[model], "preset", None, []
        slots = list(architecture(config).slots(config))
    else:
        cache = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "refresh": refresh}
        with outlined(model, **cache) as (path, named):
            planned = plan(path)
            config, stored, slots, source = planned.config, planned.stored, planned.slots, named(str(path))
            notices = [named(notice) for notice in planned.notices]
    head = any(slot.name == "head.weight" for slot in slots)
    count = parameter_count(config, head=head)
    memory = [predict(config, dtype, likely_place(), head=head) for dtype in ("float32", "float16")]
    if as_json:
        document = {
            "model": model,
            "source": source,
            "config": asdict(config),
            "parameters": count,
            "stored_dtype": stored,
            "memory": [asdict(each) | {"peak": each.peak} for each in memory],
            "tensors": [{"name": slot.name, "checkpoint_name": slot.source, "shape": slot.shape} for slot in slots],
            "notices": notices,
        }
        print(json.dumps(document))
        return

    console = Console(highlight=False)
    table = Table(title=Text(f"{model} ({source})"), show_header=False, title_justify="left")
    for key, value in asdict(config).items():
        if key == "n_inner" and value is None:
            value = f"{config.feed_forward_width} (4 x n_embd)"
        if isinstance(value, dict):
            value = ", ".join(f"{name} {each}" for name, each in value.items() if each is not None)
        table.add_row(key, str(value))
    table.add_row("head width", str(config.head_width))
    table.add_row("parameters", f"{count:,}" + (f" in {len(slots)} tensors, stored as {stored}" if stored else ""))
    console.print(table)

    table = Table(title="memory, one sequence", title_justify="left")
    for column in ("", *(each.dtype for each in memory)):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "weights": [each.weights for each in memory],
        f"keys and values, {config.n_positions} tokens": [each.kv_cache for each in memory],
        "activations, logits, workspace": [each.beside_weights - each.kv_cache for each in memory],
        "peak": [each.peak for each in memory],
    }
    for name, values in rows.items():
        table.add_row(name, *map(human, values))
    console.print(table)

    if tensors:
        table = Table("tensor", "in the checkpoint", "shape")
        for slot in slots:
            table.add_row(slot.name, slot.source, " x ".join(map(str, slot.shape)))
        console.print(table)
    for notice in notices:
        console.print(f"note: {notice}", soft_wrap=True, markup=False)
