"""`gpukernels warmup`: compile what a model will launch, before somebody waits for it."""

import json
from typing import Annotated

import typer

from model.cli.options import CacheDir, Json, Local, Model, Refresh, Revision
from model.errors import ModelError
from model.loading import load


def warmup(
    model: Model,
    rows: Annotated[int, typer.Option(min=1, help="How many sequences at a time there will be at most.")] = 1,
    device: Annotated[str, typer.Option(help="cuda or cuda:1.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or auto.")] = "auto",
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    refresh: Refresh = False,
    as_json: Json = False,
) -> None:
    """Compile the kernels of MODEL's prompts and decode steps into Triton's cache, and say how long that took."""
    if not device.startswith("cuda"):
        raise ModelError(f"--device must be cuda or cuda:1, where there is something to compile, got {device!r}")
    lm = load(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        refresh=refresh,
    )
    seconds = lm.warm_up(rows)
    if as_json:
        print(json.dumps({"model": model, "rows": rows, "seconds": seconds}))
        return
    on = f"{lm.parameters.device.name}, {lm.parameters.dtype}"
    print(f"{model} on {on}: {seconds:.1f} s for prompts of any length and steps of up to {rows} row(s), captured too")
    print("Other processes start from what is in Triton's cache now.")
