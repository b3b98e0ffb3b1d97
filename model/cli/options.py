"""Options, arguments and a progress bar that several subcommands share."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

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


def progress_bar() -> Progress:
    """On standard error while it lasts, and nowhere if that is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
