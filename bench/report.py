"""What every benchmark says of where it ran, and its table; and, as a command, README's tables.

    python -m bench.report [--write README.md]

Prints what `bench/results/` holds as Markdown (see `bench.readme`), or puts it between README's two markers.
"""

import csv
import datetime
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

import model.machine

_PACKAGES = (
    "numpy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "transformers", "liger-kernel", "ctranslate2",
    "tokenizers", "safetensors",
)  # fmt: skip


_DRIVER = Path("/proc/driver/nvidia/version")


def machine() -> dict[str, Any]:
    """The processor, the GPU, the versions, the commit and the date: a figure means little without them."""
    versions = {name: version for name in _PACKAGES if (version := model.machine.version(name))}
    processor = model.machine.processor()
    found: dict[str, Any] = {
        "processor": processor["name"] or platform.machine(),
        "cores": processor["cores"],
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    gpu = _gpu()
    return found | ({"gpu": gpu} if gpu else {})


def in_words(machine: dict[str, Any]) -> str:
    """One line of what `machine` found."""
    gpu = machine.get("gpu")
    parts = [] if gpu is None else [f"{gpu['name']}, {gpu['memory_mib'] / 1024:.0f} GiB, driver {gpu['driver']}"]
    parts += [f"{machine['cores']} cores of {machine['processor']}", f"Python {machine['python']}"]
    parts += [f"{name} {version}" for name, version in machine["versions"].items()]
    parts += [machine["date"], f"commit {machine['commit'] or 'unknown'}"]
    return "; ".join(parts)


def _gpu() -> dict[str, Any] | None:
    """The first GPU, as the driver describes it; where nvidia-smi is not there, as torch does."""
    fields = "name,driver_version,compute_cap,memory.total"
    told = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    cells = [] if told is None else [cell.strip() for cell in next(csv.reader([told]))]
    if len(cells) == 4 and cells[3].isdecimal():  # not "[N/A]", nor a sentence
        name, driver, capability, memory = cells
        return {"name": name, "driver": driver, "capability": capability, "memory_mib": int(memory)}
    if not _DRIVER.exists() or find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  ..."
    driver = re.search(r"\d+\.\d[\d.]*", _DRIVER.read_text())
    capability, memory = f"{found.major}.{found.minor}", found.total_memory >> 20
    return {"name": found.name, "driver": driver and driver[0], "capability": capability, "memory_mib": memory}


def _commit() -> str | None:
    """Of the checkout that this file is in; with a plus sign where files differ from it."""
    here = ("git", "-C", str(Path(__file__).parent))
    commit = _said(*here, "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _said(*here, "status", "--porcelain", "--untracked-files=no") else "")


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where it is not there, fails or says nothing."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.splitlines()[0] if told.strip() else None


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 120) -> None:
    """One text table on standard output; the first column is to the left."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=width).print(table)


def dumps(document: Any, *, indent: int | None = None) -> str:
    """As `json.dumps`; what is not a finite number, which JSON has not, is null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, document: Any) -> None:
    """In the place of what was there, whole at every moment."""
    write_text(file, dumps(document, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    from bench import readme

    typer.run(readme.main)


if __name__ == "__main__":
    sys.exit(main())
