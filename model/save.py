"""Writing a model in Hugging Face layout, so that a reader never meets half a file."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.architecture import architecture
from model.checkpoint import INDEX_NAME, WEIGHTS_NAME
from model.config import Config
from model.device import WIDTHS, Device
from model.errors import CheckpointError
from model.files import read_json
from model.names import HEAD
from model.parameters import Parameters, Slot
from model.tokenizer import Tokenizer

_FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_CHUNK = 4 * 2**20  # bytes made ready at a time

# Files beside the weights that a tokenizer or a generation may need, copied as they are.
_BESIDE = (
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def save(
    target: Path,
    config: Config,
    parameters: Parameters,
    *,
    values: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    folder: Path | None = None,
) -> None:
    """Writes weights, config and tokenizer.

    Args:
        target: a folder, made if it is not there, or a `.safetensors` file in one.
        values: the `config.json` that the model came with; keys that are not computed here stay.
        folder: where the model came from; small files beside the weights are copied from there.

    Tensors have transformers' names and layout (products (in, out)) and the parameters' dtype. Every
    file is written under a temporary name, synced, and renamed; the weights are written first and
    renamed last. What stands in a folder of the tokenizer or the generation of another model goes, as it
    would be taken for this one's; only a model that came from no files leaves it there.

    Raises CheckpointError where the target cannot be written, and for a single file beside the
    `config.json` of another model.
    """
    single = target.suffix == ".safetensors"
    place = target.parent if single else target
    weights = target if single else target / WEIGHTS_NAME
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place}: is not a folder")
    if weights.is_dir():
        raise CheckpointError(f"{weights}: is a folder")
    document, device = _config_json(config, parameters, values), parameters.device
    beside = place / "config.json"
    if single and beside.exists() and read_json(beside) != document:
        raise CheckpointError(f"{beside}: belongs to another model; save {target.name} into a folder of its own")

    def write(path: Path) -> None:
        _write_weights(path, architecture(config).PREFIX, parameters, device)

    try:
        place.mkdir(parents=True, exist_ok=True)
        # A disk that has no room for them is known before anything else of the folder is replaced.
        with whole_file(weights, write):
            replace_file(beside, lambda path: path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8"))
            for name in _BESIDE:
                source = folder / name if folder is not None else None
                if source is None or place.resolve() == folder.resolve():
                    continue
                if source.is_file():
                    replace_file(place / name, lambda path, source=source: shutil.copyfile(source, path))
                elif not single:
                    (place / name).unlink(missing_ok=True)
            if tokenizer is not None and (folder is None or not (folder / "tokenizer.json").is_file()):
                text = tokenizer.to_json()
                replace_file(place / "tokenizer.json", lambda path: path.write_text(text, encoding="utf-8"))
        if not single:
            # transformers prefers the single file, but other readers may take an older index first.
            (place / INDEX_NAME).unlink(missing_ok=True)
    except OSError as fault:
        raise CheckpointError(f"{fault.filename or place}: cannot be written: {fault.strerror or fault}") from None


def _config_json(config: Config, parameters: Parameters, values: dict[str, Any]) -> dict[str, Any]:
    document = {**values, **config.to_json(), "dtype": parameters.dtype}
    if "torch_dtype" in values:
        document["torch_dtype"] = parameters.dtype
    # A head that differed from the table is in the file, and a reader must not tie it again.
    document["tie_word_embeddings"] = "head.weight" not in parameters
    return document


def _write_weights(path: Path, prefix: str, parameters: Parameters, device: Device) -> None:
    def name(slot: Slot) -> str:
        return slot.source if slot.source == HEAD else f"{prefix}{slot.source}"

    slots = {name(slot): slot for slot in parameters.slots.values()}

    def read(stored: str) -> Any:
        array = parameters[slots[stored].name]
        return array.T if slots[stored].transposed else array

    shapes = {stored: slot.stored_shape for stored, slot in slots.items()}
    write_tensors(path, shapes, read, parameters.dtype, device)


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Any], dtype: str, device: Device
) -> None:
    """A safetensors file, tensor by tensor: `safetensors` itself wants all of them ready in memory at once.

    `read` is asked for each tensor of `shapes` once, in order, and gives it in `dtype` on `device`.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            array = read(name)
            rows = max(1, _CHUNK // max(1, math.prod(shape[1:]) * WIDTHS[dtype]))
            for first in range(0, shape[0], rows):
                file.write(device.to_bytes(array[first : first + rows]))
    # The format's own library has the last word before the file takes its name.
    with safe_open(str(path), "numpy") as written:
        if set(written.keys()) != header.keys() - {"__metadata__"}:
            raise OSError(0, "the file that was written cannot be read back", str(path))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under a temporary name beside `path`, then renames it over `path`."""
    with whole_file(path, write):
        pass


@contextlib.contextmanager
def whole_file(path: Path, write: Callable[[Path], Any]) -> Iterator[None]:
    """Writes a file under a temporary name beside `path`; at the end, if nothing failed, renames it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        yield
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
