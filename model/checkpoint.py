"""Safetensors files: which ones a model has, what their headers say, and whether to believe it.

A header is a JSON table of names, dtypes, shapes and byte ranges; every claim is checked against the
file's size before a tensor is read, so that a damaged or hostile file costs one sentence. The rules
are those of the format (github.com/huggingface/safetensors): ranges in order, without holes or
overlaps, that end where the file ends.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpukernels.cast import FORMATS, cast
from model.errors import CheckpointError
from model.files import AGAIN, CONVERT, disguise, json_fault, read_json

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"

#: Bits of an element by the format's dtype names; what is not here is not a safetensors file.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4",), 4),
}

#: Bytes that a header may have, by the format.
MAX_HEADER = 100_000_000

# A shard's name in an index: no absolute path, no drive, no way up.
_SHARD = re.compile(r"(?!/|.*\.\.)[\w./-]+\.safetensors")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: where its bytes are, and what they mean."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weight_files(source: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a model, and the index's name -> file map if it has one.

    Args:
        source: a folder in Hugging Face layout, or one `.safetensors` file.

    Raises:
        CheckpointError: no such files, only pickles, or an index that names what is not there.
    """
    if os.path.isfile(source):
        return [source], None
    single, index = source / WEIGHTS_NAME, source / INDEX_NAME
    if os.path.isfile(single):
        return [single], None
    if os.path.isfile(index):
        weight_map = read_index(index)
        return [source / name for name in sorted(set(weight_map.values()))], weight_map
    others = sorted(source.glob("*.safetensors"))
    if len(others) == 1:
        return others, None
    if len(others) > 1:
        names = ", ".join(path.name for path in others[:4])
        raise CheckpointError(f"{source}: several safetensors files and no {INDEX_NAME} to order them: {names}")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in source.glob(pattern))
    if pickles:
        raise CheckpointError(f"{source}: only pickled weights ({pickles[0]}), which can run code; {CONVERT}")
    raise CheckpointError(f"{source}: no weights: wanted {WEIGHTS_NAME} or {INDEX_NAME}")


def read_weight_map(path: Path) -> dict[str, str]:
    """The tensor -> file map of an index; its file names become paths, so none may lead out of the folder.

    By name only: the Hub's cache links a snapshot's files to ../../blobs, which is its own affair.
    """
    weight_map = read_json(path, CheckpointError, limit=MAX_HEADER).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not named or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object of tensor names and file names; {AGAIN}")
    refused = [file for file in sorted(set(weight_map.values())) if not _SHARD.fullmatch(file)]
    if refused:
        raise CheckpointError(
            [f"{path}: shard {file!r} is refused: it must name a .safetensors file beside it" for file in refused]
        )
    return weight_map


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint, all of whose shards are there."""
    weight_map = read_weight_map(path)
    missing = [file for file in sorted(set(weight_map.values())) if not os.path.isfile(path.parent / file)]
    if missing:
        raise CheckpointError([f"{path}: shard {file} is missing from the folder; {AGAIN}" for file in missing])
    return weight_map


def read_entries(source: Path) -> dict[str, TensorEntry]:
    """All tensors of a model by name, from the headers alone.

    Raises CheckpointError with a sentence for every file that is damaged and every name that is in
    two files, or in another than the index says.
    """
    files, weight_map = weight_files(source)
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for path in files:
        try:
            header = read_header(path)
        except CheckpointError as fault:
            problems += fault.problems
            continue
        twice = [entry.name for entry in header if entry.name in entries]
        if twice:
            other = entries[twice[0]].path.name
            problems.append(f"{path}: {len(twice)} tensors are in other files too: {twice[0]} in {other}")
        entries |= {entry.name: entry for entry in header}
    if weight_map is not None and not problems:
        index = source / INDEX_NAME
        for name, file in weight_map.items():
            if name not in entries or entries[name].path.name != Path(file).name:
                problems.append(f"{index}: says {name} is in {file}, which does not have it")
        problems += [f"{index}: does not list {name}, which a shard has" for name in entries if name not in weight_map]
    if problems:
        raise CheckpointError(problems)
    return entries


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in file order; CheckpointError if the file is not whole."""
    try:
        if path.is_fifo():  # opening it would wait for a writer
            raise CheckpointError(f"{path}: a safetensors file is read from several places, and this is a pipe")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; {AGAIN}")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER or 8 + length > size:
                start += file.read(192)
                raise CheckpointError(f"{path}: {_what_it_is(start, length, size)}")
            raw = file.read(length)
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault.strerror}") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError(f"it must be an object, got {type(header).__name__}")
        return list(_entries(path, header, 8 + length, size))
    except (ValueError, RecursionError) as fault:
        if isinstance(fault, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the header is damaged: {json_fault(fault)}; {AGAIN}") from None


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """The values of one tensor of a dtype in `FORMATS`, in memory of their own, widened to float32.

    Raises CheckpointError where the file cannot be read.
    """
    try:
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            raw = file.read(entry.nbytes)
    except OSError as fault:
        raise CheckpointError(f"{entry.path}: cannot be read: {fault.strerror}") from None
    if len(raw) != entry.nbytes:
        raise CheckpointError(f"{entry.path}: ended inside tensor {entry.name}: the file changed while it was read")
    out = np.empty(entry.shape, np.float32)
    cast(np.frombuffer(raw, FORMATS[entry.dtype]), entry.dtype, out)
    return out


def _what_it_is(start: bytes, length: int, size: int) -> str:
    """Why a file does not begin as a safetensors file does, and what to do."""
    if impostor := disguise(start):
        return impostor
    if length > MAX_HEADER:
        return f"not a safetensors file: the header would have {length} bytes, {MAX_HEADER} is the most; {AGAIN}"
    return f"truncated: the header has {length} bytes but the file only {size}; {AGAIN}"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands in it twice")
    return table


def _entries(path: Path, header: dict, data: int, size: int) -> Iterator[TensorEntry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to strings")
    entries = [_entry(path, name, info, data) for name, info in header.items()]
    end = data
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {entry.name} {fault}; {AGAIN}")
        end += entry.nbytes
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {entry.name} ends at byte {end}, the file at {size}; {AGAIN}"
            )
        yield entry
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; {AGAIN}")


def _entry(path: Path, name: str, info: object, data: int) -> TensorEntry:
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        whole = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not whole:
            raise ValueError(f"tensor {name} has the {what} {numbers!r}")
    if len(shape) > 16:
        raise ValueError(f"tensor {name} has {len(shape)} dimensions")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"tensor {name} has the data_offsets {offsets}")
    bits, nbytes = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise ValueError(f"tensor {name} of {dtype} {tuple(shape)} cannot have {nbytes} bytes")
    return TensorEntry(name, path, dtype, tuple(shape), data + offsets[0], nbytes)
