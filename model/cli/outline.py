"""A look at a model of the Hub without its weights: what `info` and `check` ask for."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.load import locate


@contextlib.contextmanager
def outlined(model: str, *, weights: bool = False, **options: Any) -> Iterator[tuple[Path, Callable[[str], str]]]:
    """Where MODEL's JSON and headers are, and how a text names it.

    A model of the Hub that is not in its cache is not downloaded, unless its `weights` are wanted: its headers stand
    in a folder that goes when this ends, and whose path nobody needs to see.
    """
    with tempfile.TemporaryDirectory(prefix="outline-") as folder:

        def named(text: str) -> str:
            return text.replace(folder, model)

        try:
            yield locate(model, outline=None if weights else Path(folder), **options), named
        except ModelError as fault:
            raise type(fault)([named(problem) for problem in fault.problems]) from None
