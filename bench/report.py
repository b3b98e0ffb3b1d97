"""What every benchmark prints about where it ran, and its table."""

import datetime
import os
import platform
from collections.abc import Sequence
from importlib import metadata

from rich.console import Console
from rich.table import Table


def machine() -> dict[str, object]:
    """The processor, the versions, and the date: a figure means little without them."""
    versions = {}
    for name in ("numpy", "torch", "triton", "transformers", "ctranslate2", "tokenizers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One text table on standard output; the first column is to the left."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=120).print(table)
