"""From a name to a model: find the files, read the config, match the names, fill the parameters.

    source -> locate -> Plan (config, tensors matched to slots; nothing allocated) -> fill

`plan` alone is the pre-flight: it reads JSON and headers, never weights. Every problem it meets is in
one error. `fill` then allocates each parameter once and reads each tensor straight into its place.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpukernels.cast import FORMATS, Losses, cast
from model.adapter import CONFIG_NAME as ADAPTER
from model.architecture import architecture
from model.checkpoint import TensorEntry, read_entries
from model.config import Config, read_config
from model.device import Device
from model.errors import CheckpointError, ModelError, overflow_notice
from model.files import as_path, read_json
from model.host_upload import CHUNK
from model.names import HEAD, map_names
from model.parameters import Parameters, Slot

#: The embedded model: 5.9 M parameters, trained on the King James Bible.
BUNDLED = "tiny-gpt2"
_BUNDLED_FOLDER = Path(__file__).parent / "bundled" / BUNDLED

_OWN = "tok_embeddings.weight"  # of `consolidated.safetensors`, which a Mistral's folder has beside the shards


@dataclass
class Plan:
    """What would be loaded: the config, and for every slot the tensor that fills it."""

    source: Path  # the folder, or the .safetensors file
    values: dict  # config.json as it stands
    config: Config
    slots: list[Slot]
    entries: dict[str, TensorEntry]  # by slot name
    notices: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.source.parent if self.source.is_file() else self.source

    @property
    def own_head(self) -> bool:
        """Whether the output matrix is one of its own, and not the token table."""
        return "head.weight" in self.entries

    @property
    def stored(self) -> str:
        """The dtype of the checkpoint's largest tensor."""
        return max(self.entries.values(), key=lambda entry: entry.nbytes).dtype


def locate(
    source: str | Path,
    *,
    revision=None,
    cache_dir=None,
    local_files_only=False,
    token=None,
    refresh=False,
    outline: Path | None = None,
):
    """The folder or file of a model: a path, the embedded model's name, or a name on the Hub.

    What exists on disk comes first, then `tiny-gpt2`, then the Hub (its cache, then the network). With `outline`,
    an empty folder, a model that is not cached is not downloaded: see `model.hub.fetch`.
    """
    path = as_path("source", source, CheckpointError)
    if os.path.exists(path):  # False where a link leads into what may not be read
        if not path.is_dir() and not (path.is_file() and path.suffix == ".safetensors"):
            raise CheckpointError(f"{path}: must be a folder or a .safetensors file")
        return path
    if str(source) == BUNDLED:
        return _BUNDLED_FOLDER
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.endswith(".safetensors"):
        raise CheckpointError(f"{source}: there is no such file or folder")
    from model.hub import fetch

    return fetch(
        text,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        refresh=refresh,
        outline=outline,
    )


def plan(source: Path, *, headers_only: bool = False) -> Plan:
    """Reads config.json and the headers of `source`, and matches them.

    A config that ties the output matrix to the token table, with a file that has both, asks for a look
    at their bytes; `headers_only` leaves that out and takes them for equal.

    Raises ModelError (ConfigError, CheckpointError) with every problem found: a config key that is
    refused, a damaged file, each tensor that is missing, unexpected, or of the wrong shape or dtype.
    """
    folder = source.parent if source.is_file() else source
    path, faults = folder / "config.json", []
    if os.path.isfile(folder / ADAPTER) and not os.path.lexists(path):
        raise CheckpointError(
            f"{folder}: holds an adapter and no model: load the model that it is of, then the adapter "
            "(generate --adapter, lm.load_adapter)"
        )
    values = _attempt(faults, read_json, path)
    tensors = _attempt(faults, read_entries, source)
    config = _attempt(faults, read_config, values, str(path)) if values is not None else None
    if faults:
        raise type(faults[0])([problem for fault in faults for problem in fault.problems])
    config, notices = config

    if _OWN in tensors:
        what = f"{_OWN} is a name of Meta's and Mistral's own files, which are not read"
        raise CheckpointError(f"{tensors[_OWN].path}: {what}; fetch those in Hugging Face layout")
    model = architecture(config)
    names = map_names(tensors, model.PREFIX, model.BUFFER)
    notices += names.notices
    by_base = {base: tensors[name] for base, name in names.names.items()}
    head = by_base.get(HEAD)
    table = by_base.get(model.TABLE)
    own_head = not config.tie_word_embeddings
    if head is not None and table is None and config.tie_word_embeddings:
        by_base[model.TABLE] = by_base.pop(HEAD)  # safetensors' save_model keeps one name of the two
    elif head is not None and config.tie_word_embeddings:
        own_head = head.shape != table.shape or not (headers_only or _equal(head, table))
        if own_head:
            notices.append(f"{HEAD} differs from {model.TABLE} although the config ties them: the file's is used")
        else:
            del by_base[HEAD]
    slots = list(model.slots(config, head=own_head))
    problems = [f"{source}: {problem}" for problem in names.problems] + _mismatches(source, slots, by_base)
    if problems:
        raise CheckpointError(problems)
    return Plan(source, values, config, slots, {slot.name: by_base[slot.source] for slot in slots}, notices)


def _attempt(faults: list[ModelError], read: Callable, *arguments):
    """What `read` returns; what it raises joins `faults`, so that one error can list them all."""
    try:
        return read(*arguments)
    except ModelError as fault:
        faults.append(fault)


def _mismatches(source: Path, slots: Sequence[Slot], tensors: dict[str, TensorEntry]) -> list[str]:
    """What is missing, unexpected, or of the wrong shape or dtype, a sentence each."""
    wanted = {slot.source: slot for slot in slots}
    missing = [
        f"{source}: tensor {name} {slot.stored_shape} is missing"
        for name, slot in wanted.items()
        if name not in tensors
    ]
    unexpected = [
        f"{entry.path}: tensor {entry.name} {entry.shape} is unexpected: this model has no such parameter"
        for name, entry in tensors.items()
        if name not in wanted
    ]
    wrong = []
    for name, slot in wanted.items():
        entry = tensors.get(name)
        if entry is None:
            continue
        if entry.shape != slot.stored_shape:
            turned = " (it looks transposed: was it saved from torch.nn.Linear?)" * (
                slot.transposed and entry.shape == slot.shape
            )
            shapes = f"is {entry.shape}, the config wants {slot.stored_shape}{turned}"
            wrong.append(f"{entry.path}: tensor {entry.name} {shapes}")
        elif entry.dtype not in FORMATS:
            wrong.append(
                f"{entry.path}: tensor {entry.name} has the dtype {entry.dtype}; weights must be {', '.join(FORMATS)}"
            )
    return [*missing, *unexpected, *wrong]


def _equal(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors of one shape have the same values, compared a chunk at a time."""
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= FORMATS.keys():
        return False
    with open(a.path, "rb") as file_a, open(b.path, "rb") as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        step = CHUNK // 8  # no element has more bytes
        for start in range(0, a.size, step):
            share = min(step, a.size - start)
            part_a, part_b = (file.read(each.nbytes * share // each.size) for file, each in ((file_a, a), (file_b, b)))
            if a.dtype != b.dtype:
                part_a, part_b = (_as_float32(part, each.dtype) for part, each in ((part_a, a), (part_b, b)))
            if part_a != part_b:
                return False
    return True


def _as_float32(raw: bytes, dtype: str) -> bytes:
    out = np.empty(len(raw) // FORMATS[dtype].itemsize, np.float32)
    cast(np.frombuffer(raw, FORMATS[dtype]), dtype, out)
    return out.tobytes()


@dataclass(frozen=True)
class Filled:
    """Parameters read from files, and what reading them was like.

    Attributes:
        losses: what the cast of each tensor lost, by its name in the checkpoint.
        nbytes: read from the files.
        seconds: from the first byte to the last cast. (On CUDA the first load ever compiles the kernel, too; CuPy
            keeps it on disk.)
        way: one sentence on how the bytes went.
    """

    parameters: Parameters
    losses: dict[str, Losses]
    nbytes: int
    seconds: float
    way: str

    @property
    def gigabytes_per_second(self) -> float:
        """Of the files' bytes, 10^9 of them."""
        return self.nbytes / self.seconds / 1e9

    @property
    def notices(self) -> list[str]:
        """A sentence for every tensor with values that became infinite."""
        return [
            overflow_notice(name, lost.overflowed, self.parameters.dtype)
            for name, lost in self.losses.items()
            if lost.overflowed
        ]


def fill(
    plan: Plan,
    device: Device,
    dtype: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    audit: str | None = None,
) -> Filled:
    """Allocates the parameters and reads every tensor into its place, in file order.

    Args:
        progress: called with the bytes read and the bytes to read.
        audit: the dtype whose losses are counted, those of casts that cannot lose too; default `dtype`'s, of
            what can.
    """
    parameters = Parameters(plan.slots, device, dtype)
    pairs = sorted(
        ((plan.entries[slot.name], slot) for slot in plan.slots), key=lambda pair: (pair[0].path, pair[0].offset)
    )
    total, done = sum(entry.nbytes for entry, _ in pairs), 0
    file: BinaryIO | None = None
    opened: Path | None = None
    started = time.perf_counter()
    upload = device.upload(len(pairs), dtype=dtype, audit=audit)
    try:
        for entry, slot in pairs:
            if entry.path != opened:
                if file is not None:
                    file.close()
                # Unbuffered: a read goes straight into the memory it is given.
                file, opened = open(entry.path, "rb", buffering=0), entry.path  # noqa: SIM115
            file.seek(entry.offset)
            read = partial(_read_exactly, file, entry)
            upload.add(read, entry.dtype, entry.shape, parameters[slot.name], transposed=slot.transposed)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
    except OSError as fault:
        raise CheckpointError(f"{entry.path}: cannot be read: {fault.strerror}") from None
    finally:
        if file is not None:
            file.close()
    losses = upload.finish()
    seconds = time.perf_counter() - started
    by_name = {entry.name: lost for (entry, _), lost in zip(pairs, losses, strict=True)}
    return Filled(parameters, by_name, total, seconds, device.how_it_loads())


def _read_exactly(file: BinaryIO, entry: TensorEntry, out: memoryview) -> None:
    """Fills `out` with the tensor's next bytes."""
    while out.nbytes:
        count = file.readinto(out)
        if not count:
            raise CheckpointError(f"{entry.path}: ended inside tensor {entry.name}: the file changed while it was read")
        out = out[count:]


_DRAWN = 2**18  # random numbers that are made ready at a time


def fill_random(slots: Iterable[Slot], config: Config, device: Device, dtype: str, seed: int) -> Parameters:
    """Parameters as GPT-2 starts training: N(0, 0.02), the residual projections' over sqrt(2 L).

    Norm weights are 1, biases 0. A seed gives the same numbers on every device, rounded to `dtype`.
    """
    parameters = Parameters(slots, device, dtype)
    random = np.random.default_rng(seed)
    memory = np.empty(max([_DRAWN, *(slot.stored_shape[-1] for slot in parameters.slots.values())]), np.float32)
    for slot in parameters.slots.values():
        array = parameters[slot.name]
        view = array.T if slot.transposed else array
        spread = 0.02
        if ".projection." in slot.name or ".down." in slot.name:
            spread /= (2 * config.n_layer) ** 0.5
        rows = max(1, _DRAWN // max(1, slot.stored_shape[-1] if len(slot.shape) > 1 else 1))
        for start in range(0, view.shape[0], rows):
            part = view[start : start + rows]
            values = memory[: math.prod(part.shape)]
            if len(slot.shape) > 1:
                random.standard_normal(out=values, dtype=np.float32)
                values *= np.float32(spread)
            else:
                values.fill(float(slot.name.endswith(".weight")))
            device.cast(values, "F32", part)
    return parameters
