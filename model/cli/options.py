"""Options, arguments and a progress bar that several subcommands share."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from model.errors import ModelError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .safetensors file, a name on the Hub, or tiny-gpt2 (the embedded model).",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A folder, a .safetensors file, a name on the Hub, or tiny-gpt2 (the embedded model).",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
CacheDir = Annotated[str | None, typer.Option(help="The Hub's cache, if not the usual one.", show_default=False)]
Local = Annotated[bool, typer.Option("--local-files-only", help="Never ask the network.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Ask the Hub for a newer version of a cached model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def table_console(width: int) -> Console:
    """Standard output for wide tables: `width` columns where neither a terminal nor COLUMNS says how many it has."""
    console = Console(highlight=False, markup=False)
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, markup=False, width=width)


def check_output(option: str, path: Path | None) -> None:
    """ModelError if no file can be put there: said before the work, not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ModelError(f"{option}: there is no folder {path.parent}")
    if path.is_dir():
        raise ModelError(f"{option}: {path} is a folder")
    if not os.access(folder, os.W_OK):
        raise ModelError(f"{option}: nothing can be written to {folder}")


def progress_bar() -> Progress:
    """On standard error while it lasts, and nowhere if that is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
