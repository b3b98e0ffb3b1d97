"""Files that a measurement is to be written to."""

import os
from pathlib import Path


def require_writable(*files: Path | None) -> None:
    """ValueError where no file can be put: said before the minutes of work, not after them."""
    for file in files:
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{file}: there is no folder {folder}")
        if file.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{file}: no file can be written there")
