"""Small models that train, and what their runs are compared by."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import reference
import reference_llama
import torch
from rich.console import Console

import model
from model.finetune.batches import Batches
from model.finetune.data import Document
from model.finetune.distributed import World
from model.finetune.log import Log
from model.finetune.modules import Network
from model.finetune.packing import pack
from model.finetune.settings import Settings
from model.finetune.train import Trainer

QUIET = Console(quiet=True)
VOCABULARY, CONTEXT = 97, 24


def folder_of(path: Path, name: str = "default", **changes) -> Path:
    """A checkpoint of `reference`, whose weights let no mistake hide."""
    positions = "n_positions" if name not in reference_llama.CONFIGS else "max_position_embeddings"
    reference.build(name, **{positions: CONTEXT}, **changes).save_pretrained(path)
    return path


def load(folder: Path) -> model.LanguageModel:
    return model.load(folder, device="cpu")


def documents(count: int, *, seed: int = 0, longest: int = 40) -> list[Document]:
    """Documents of 2 tokens and more, in which some tokens do not count."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest, count)
    return [Document(random.integers(0, VOCABULARY, n).astype(np.int32), random.random(n) < 0.8) for n in lengths]


def trainer(
    lm: model.LanguageModel, train: list[Document], validation=(), *, dtype=torch.float64, **options
) -> Trainer:
    """A run by hand, in float64 unless said otherwise, in which every parameter trains."""
    settings = Settings.of({"learning_rate": 1e-3, **options})
    world, context = World(), settings.window(lm.positions)
    return Trainer(
        Network(lm.parameters, lm.config, dtype=dtype, recompute=settings.recompute, dropout=settings.dropout),
        Batches(pack(train, context), settings.batch_size, settings.accumulate, settings.seed, world),
        Batches(pack(validation, context), settings.batch_size, 1, settings.seed, world),
        settings,
        world=world,
        started={},
    )


def other(run: Trainer, **changes) -> Trainer:
    """The same network and data with other settings."""
    settings = replace(run.settings, **changes)
    train = replace(run.train, size=settings.batch_size, accumulate=settings.accumulate)
    return Trainer(run.network, train, run.validation, settings, world=run.world, started={})


def quiet_log(total: int = 1) -> Log:
    return Log(None, total=total, console=QUIET)


def records(out: Path) -> list[dict]:
    """The log, without what a clock or the process's memory has to do with."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory")} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()
