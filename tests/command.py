"""The `gpukernels` command, in this process and in one of its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.cli.app import main

_INSTALLED = Path(sys.executable).with_name("gpukernels")
#: As users type it; in a plain checkout there is the module only.
COMMAND = [_INSTALLED] if _INSTALLED.exists() else [sys.executable, "-m", "model.cli"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: its exit code, standard output, and standard error."""

    def go(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpukernels", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            main()
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return go


@pytest.fixture
def refused(run):
    """Runs a command that is a mistake; the lines that say so."""

    def go(*arguments: str, stdin: bytes | None = None, lines: int | None = 1) -> list[str]:
        code, out, err = run(*arguments, stdin=stdin)
        found = err.splitlines()
        assert (code, out) == (2, "")
        assert all(line.startswith("error: ") and line.isprintable() for line in found)
        assert found if lines is None else len(found) == lines
        return found

    return go


def start(*arguments: str | bytes, **options) -> subprocess.Popen:
    """Starts the command."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "RUST_BACKTRACE": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, env=environment, **options)
