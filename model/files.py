"""Small files of JSON, and what a file is that is not what its name says."""

import json
import os
from pathlib import Path
from typing import Any

from model.errors import ConfigError, ModelError

#: What to do about a file that is not whole.
AGAIN = "fetch the file again"

#: How to turn a pickle into something that can be read without running it.
CONVERT = (
    "convert it where you trust it: transformers.AutoModelForCausalLM.from_pretrained(NAME)"
    ".save_pretrained(FOLDER) writes safetensors"
)


_PART = 2**16  # bytes of a small file that are read at a time

#: How a Git LFS pointer begins.
LFS = b"version https://git-lfs"


def as_path(name: str, value: Any, error: type[ModelError]) -> Path:
    """`value`, text or a path, with ~ for the home folder; `error`, which has the argument's name, for what is none."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise error(f"{name} must be a path, got {value!r}")
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as fault:
        raise error(f"{text}: cannot be a path: {getattr(fault, 'strerror', None) or fault}") from None
    return path


def read_json(path: Path, error: type[ModelError] = ConfigError, limit: int = 16 * 2**20) -> dict[str, Any]:
    """The JSON object in a small file; `error` with one sentence for anything else."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = bytearray()
            # A device has no size, and perhaps no end.
            while max(size, len(raw)) <= limit and (part := file.read(_PART)):
                raw += part
        if max(size, len(raw)) > limit:
            raise error(f"{path}: {max(size, len(raw))} bytes, more than the {limit} such a file may have")
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}") from None
    if not raw:
        raise error(f"{path}: the file is empty; {AGAIN}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise error(f"{path}: {disguise(raw) or f'not valid JSON: {json_fault(fault)}; {AGAIN}'}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, got {json.dumps(value, ensure_ascii=False)}")
    return value


def json_fault(fault: Exception) -> str:
    """What Python's reader found, without its advice to change Python."""
    if isinstance(fault, RecursionError):
        return "nested too deep"
    if "int_max_str_digits" in str(fault):
        return "a number of more than 4300 digits"
    return str(fault)


def disguise(start: bytes) -> str | None:
    """What a file is that begins like this, if it is a common impostor, and what to do."""
    text = start.lstrip().lower()
    if start.startswith(LFS):
        return (
            "this is a Git LFS pointer of a few lines, not the file itself; "
            "run 'git lfs pull' in its repository, or download the file"
        )
    if text.startswith((b"<!doctype", b"<html")):
        return f"this is a web page, not the file: the download failed; {AGAIN}"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return f"this is a pickle under another name, which can run code; {CONVERT}"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file under another name, which is not read here; take the model's safetensors"
    return None
