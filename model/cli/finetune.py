"""`gpukernels finetune`: a model and a text in, a model out."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model.cli.options import CacheDir, Local, ModelOption, Revision
from model.device import why_no_cuda
from model.finetune.settings import Settings
from model.load import BUNDLED
from model.loading import load
from model.on_disk import load_on_disk

#: The defaults live once.
_D = Settings()


def finetune(
    data: Annotated[Path, typer.Option(help="What to train on: .txt, .jsonl or .npy (token ids).")],
    out: Annotated[Path, typer.Option(help="A new folder for the model, its log, and checkpoints meanwhile.")],
    model: ModelOption = BUNDLED,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, started alike.")] = False,
    validation_data: Annotated[
        Path | None, typer.Option(help="What to validate on, in place of a share of DATA.", show_default=False)
    ] = None,
    validation: Annotated[float, typer.Option(help="The share of the documents that validates.")] = _D.validation,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window; default the model's, 1024 at most.", show_default=False)
    ] = None,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt", help="Of .jsonl, learn completions and answers only.")
    ] = False,
    separator: Annotated[
        str | None, typer.Option(help="What stands between the documents of a .txt file.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the order, adapters and dropout.")] = _D.seed,
    epochs: Annotated[int, typer.Option(help="How often every window is seen.")] = _D.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.", show_default=False)] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Seconds at most; --resume goes on.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of a forward pass, on each process.")] = _D.batch_size,
    accumulate: Annotated[int, typer.Option(help="Forward passes of an optimizer step.")] = _D.accumulate,
    optimizer: Annotated[str, typer.Option(help="adamw; or muon, for the matrices inside the blocks.")] = _D.optimizer,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="The largest.")] = _D.learning_rate,
    schedule: Annotated[str, typer.Option(help="constant, linear, cosine or inverse_sqrt.")] = _D.schedule,
    warmup: Annotated[float, typer.Option(help="Steps that lead up to the rate; below 1, their share.")] = _D.warmup,
    floor: Annotated[float, typer.Option(help="The smallest rate after the warm-up.")] = _D.floor,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = _D.weight_decay,
    betas: Annotated[tuple[float, float], typer.Option(help="Of AdamW.")] = _D.betas,
    clip: Annotated[float, typer.Option(help="The largest norm of a gradient; 0: any.")] = _D.clip,
    dropout: Annotated[
        float, typer.Option(help="The share dropped of embedded tokens and of what blocks add to them.")
    ] = _D.dropout,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help='Names that do not train: "blocks.*"; may be given again.', show_default=False),
    ] = None,
    unfreeze: Annotated[
        list[str] | None,
        typer.Option(help="Names that train in spite of that; may be given again.", show_default=False),
    ] = None,
    layers: Annotated[str | None, typer.Option(help='Only these blocks train: "2-5".', show_default=False)] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank, and not the weights.", show_default=False)
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of adapters, default 16: their scale is alpha / rank.", show_default=False)
    ] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(
            help='Layers with adapters: qkv (the default), projection, up, down, or "blocks.0.*".', show_default=False
        ),
    ] = None,
    lora_rank_stabilized: Annotated[
        bool, typer.Option("--lora-rank-stabilized", help="The scale is alpha / sqrt(rank).")
    ] = False,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write the adapter, in PEFT's layout, and no model.")
    ] = False,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; default an epoch.", show_default=False)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a better loss, then stop.", show_default=False)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints, besides every evaluation's.", show_default=False)
    ] = None,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: each process keeps a part of the model (FSDP2).")
    ] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, a third more work.")] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On CUDA, one launch a pass: for a host that is slower than its GPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or auto.")] = _D.dtype,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard or wandb; may be given again.", show_default=False)
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: Local = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table and no progress.")] = False,
) -> None:
    """Train MODEL on DATA and write the best of it to OUT, for `gpukernels generate --model OUT` and transformers.

    Ctrl-C and SIGTERM save a checkpoint and end; the same command with --resume goes on. Several processes:
    torchrun --nproc-per-node N -m model.cli finetune ...
    """
    options = {
        "validation": validation,
        "context": context,
        "mask_prompt": mask_prompt,
        "separator": separator,
        "seed": seed,
        "epochs": epochs,
        "max_steps": max_steps,
        "max_time": max_time,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "floor": floor,
        "weight_decay": weight_decay,
        "betas": betas,
        "clip": clip or None,
        "dropout": dropout,
        "freeze": freeze or (),
        "unfreeze": unfreeze or (),
        "layers": layers,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_targets": lora_target or None,
        "lora_rank_stabilized": lora_rank_stabilized,
        "keep_adapter": keep_adapter,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "save_every": save_every,
        "fsdp": fsdp,
        "recompute": recompute,
        "cuda_graph": cuda_graph,
        "dtype": dtype,
    }
    Settings.of(options)  # before anything is loaded
    if device == "auto":
        device = "cpu" if why_no_cuda() else "cuda"
    on_cpu = device == "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    lm = (load_on_disk if fsdp else load)(
        model,
        device=device,
        dtype="float32" if on_cpu else dtype,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    leads = int(os.environ.get("RANK", 0)) == 0
    console = Console(stderr=True, quiet=quiet or not leads, highlight=False, markup=False)
    for notice in lm.notices:
        console.print(f"note: {notice}", soft_wrap=True)
    result = lm.finetune(
        data,
        out=out,
        resume=resume,
        validation_data=validation_data,
        trackers=tracker or (),
        console=console,
        **options,
    )
    best = ""
    if result.validation_loss is not None:
        best = f"; best at step {result.best_step}: validation loss {result.validation_loss:.4f}"
        best += f", perplexity {result.perplexity:.2f}"
    if leads:
        print(f"{result.reason} after {result.steps} steps{best}; written to {out}")
    if result.signal is not None:
        sys.exit(128 + result.signal)
