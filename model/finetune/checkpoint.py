"""What a run needs to go on where it was stopped: safetensors and JSON in a folder that is there whole or not at all.

    OUT/                         the model so far in Hugging Face layout: the best, or without validation the last
    OUT/log.jsonl                a line for each step and evaluation
    OUT/checkpoint-120/          after step 120
        training.safetensors     exact weights, both moments, and the best weights, float32, by parameter; where they
                                 are sharded those of rank 0, beside training-1.safetensors and so on
        training.json            counters, loss scale, position in the data, settings, and what it was started with

Every order of windows follows from the seed and the epoch, and nothing else is drawn while a run goes on: the
position in the data is all there is to know of random streams.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open

from gpukernels.numbers import finite, whole
from model import adapter
from model.checkpoint import WEIGHTS_NAME
from model.device import TorchDevice
from model.errors import CheckpointError, TrainingError
from model.files import read_json
from model.finetune import log
from model.finetune.distributed import World
from model.finetune.modules import Network
from model.parameters import Lazy, Slot
from model.save import write_tensors

_FOLDER = re.compile(r"checkpoint-(\d+)")
_HALF = re.compile(r"\..+\.\d+\.tmp")  # a file of `save.replace_file` that a kill left behind
_DOCUMENT = "training.json"
_ALONE = World()
_HINTS = {"weights": "; a run changes them: to go on, load anew the model that it began with"}
VERSION = 1

Numbers = TypeVar("Numbers")  # a dataclass of them


class Weights(Lazy):
    """The weights of a network as `model.save` reads a model's parameters: each made when it is asked for."""

    def __init__(self, slots: Mapping[str, Slot], network: Network):
        super().__init__(slots)
        self._network = network
        first = network.tokens.weight
        self.device, self.dtype = TorchDevice(first.device), str(first.dtype).removeprefix("torch.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._network.weight(name)


def check_out(out: Path, *, resume: bool) -> None:
    """Raises TrainingError where `out` cannot take a new run, or has none to go on with."""
    if not out.exists():
        if resume:
            raise TrainingError(f"{out}: there is no run to resume: the folder does not exist")
        return
    if not out.is_dir():
        raise TrainingError(f"{out}: is not a folder")
    if not resume and any(out.iterdir()):
        raise TrainingError(f"{out}: exists; give another folder, or resume the run that it holds")
    made = any((out / name).exists() for name in (WEIGHTS_NAME, adapter.WEIGHTS_NAME))
    if resume and newest(out) is None and made:
        if (out / log.NAME).exists():
            drop(out)  # what a kill left that came while the last checkpoint was removed
        raise TrainingError(f"{out}: holds a model and no checkpoint: there is no run to resume, or it has finished")
    # A kill before the first checkpoint leaves the log. What has neither is something else of the user's.
    if resume and newest(out) is None and not (out / log.NAME).exists() and any(out.iterdir()):
        raise TrainingError(f"{out}: there is no run to resume: it has neither a checkpoint nor {log.NAME}")


def newest(out: Path) -> Path | None:
    """The checkpoint of the latest step."""
    found = [(int(match[1]), path) for path in out.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return max(found)[1] if found else None


def write(
    out: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    document: Mapping[str, Any],
    world: World = _ALONE,
) -> None:
    """Writes the checkpoint of a step, then drops the older ones.

    Each rank of `world` calls it with tensors of its own. The folder is filled under another name, synced and
    renamed: a kill or a full disk at any moment leaves the checkpoint before it whole. Raises CheckpointError
    where it cannot be written.
    """
    folder = out / f"checkpoint-{step}"
    if folder.exists():  # resumed, and stopped again before the next step
        return
    temporary = out / f".{folder.name}.tmp"
    try:
        if world.leads:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.wait()
        path = temporary / _file(world)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        device = TorchDevice(next(iter(tensors.values())).device)
        write_tensors(path, shapes, tensors.__getitem__, "float32", device)
        _sync(path)
        world.wait()
        if world.leads:
            text = json.dumps(document, indent=1, allow_nan=False)
            (temporary / _DOCUMENT).write_text(text + "\n", encoding="utf-8")
            for path in (temporary / _DOCUMENT, temporary):
                _sync(path)
            os.rename(temporary, folder)
            _sync(out)
        world.wait()
    except OSError as fault:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written: {fault.strerror or fault}") from None
    if world.leads:
        drop(out, but=folder)


def drop(out: Path, but: Path | None = None) -> None:
    """Removes the checkpoints but one, and what a kill left half-written."""
    for path in list(out.iterdir()):
        if _HALF.fullmatch(path.name):
            path.unlink(missing_ok=True)
            continue
        name = path.name.removeprefix(".").removesuffix(".tmp")
        if path == but or not _FOLDER.fullmatch(name):
            continue
        # Under a name that is no checkpoint's: a kill meanwhile leaves none that is half there.
        doomed = out / f".{name}.tmp"
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_document(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a checkpoint; TrainingError where it was started with something else than `wanted`."""
    document = read_json(folder / _DOCUMENT, CheckpointError)
    if document.get("version") != VERSION:
        raise CheckpointError(f"{folder / _DOCUMENT}: has the version {document.get('version')!r}, not {VERSION}")
    started = document.get("started")
    problems = list(_differences(started if isinstance(started, dict) else {}, wanted))
    if problems:
        raise TrainingError([f"{folder.parent}: {problem}" for problem in problems])
    return document


def _differences(started: Mapping[str, Any], wanted: Mapping[str, Any], group: str = "") -> Iterator[str]:
    names = started.keys() | wanted.keys()
    if started.get("model_type") != wanted.get("model_type"):
        names = {"model_type"}  # of another kind, nothing else is the same either
    for name in sorted(names):
        then, now = started.get(name), wanted.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{name}: ")
        elif then != now:
            yield f"the run was started with {group}{name} {then!r}, not {now!r}{_HINTS.get(name, '')}"


def numbers(folder: Path, document: Mapping[str, Any], group: str, kind: type[Numbers]) -> Numbers:
    """A dataclass of numbers, each of which has a default, from its group of a checkpoint's JSON.

    What the file lacks has its default. Raises CheckpointError where there is no such group, and for a name or value
    that is not one of the class's: a whole number is not below 0, a number finite, and null stands where the default
    is None.
    """
    path, values = folder / _DOCUMENT, document.get(group)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {group} must be an object, got {json.dumps(values)}")
    defaults = asdict(kind())
    for name, value in values.items():
        default = defaults.get(name)
        if name not in defaults:
            raise CheckpointError(f"{path}: {group} has no {name}")
        if isinstance(default, bool):
            fits = isinstance(value, bool)
        elif isinstance(default, int):
            fits = whole(value) and 0 <= value < 2**63
        else:
            fits = finite(value) or (value is None and default is None)
        if not fits:
            raise CheckpointError(f"{path}: {name} of {group} cannot be {json.dumps(value)}")
    return kind(**values)


def read_tensors(folder: Path, wanted: Mapping[str, torch.Tensor], world: World = _ALONE) -> dict[str, torch.Tensor]:
    """The tensors `wanted` of a checkpoint, on the CPU."""
    path = folder / _file(world)
    try:
        with safe_open(str(path), "pt") as file:
            names = [name for name in file.keys() if name in wanted]  # noqa: SIM118
            found = {name: file.get_tensor(name) for name in names}
    except Exception as fault:  # the library raises its own of many kinds
        raise CheckpointError(f"{path}: cannot be read: {fault}") from None
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            shape = tuple(found[name].shape) if name in found else "missing"
            raise CheckpointError(f"{path}: {name} must be {tuple(tensor.shape)}, and is {shape}")
    return found


def _file(world: World) -> str:
    return f"training-{world.rank}.safetensors" if world.rank else "training.safetensors"


def fingerprint(arrays: Iterable[Any]) -> str:
    """A checksum of arrays' bytes, NumPy's or torch's."""
    total = 0
    for array in arrays:
        if isinstance(array, torch.Tensor):
            array = TorchDevice(array.device).to_bytes(array)
        total = zlib.crc32(np.ascontiguousarray(array), total)
    return f"{total:08x}"


def _sync(path: Path) -> None:
    """Until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
