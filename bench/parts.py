"""The parts of a GPU run: commands in processes of their own, each killed when its time is up."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
JSON = "{json}"  # in a command: the file that the part keeps its figures in

_TAIL = 40  # lines kept of what a part prints
_GRACE = 2.0  # seconds between asking a part to end and ending it


class Part(NamedTuple):
    """One command after `python`, its expected and its longest time in seconds, and the modules that it needs."""

    name: str
    command: tuple[str, ...]
    expected: float
    most: float
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Of what it needs, what is not here."""
        return [name for name in self.needs if not _there(name)]


def parts() -> list[Part]:
    """In the order of their worth."""
    spread = ("--numprocesses", "4") if _there("xdist") else ()
    # What cannot be imported here (a judge that is not installed) does not keep the rest from running.
    tests = ("-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    tests = (*tests, *spread, "tests")
    command = ("-c", "from model.cli import main; main()")
    kernels = ("-m", "bench.kernels", "--json", JSON)
    return [
        Part("compile", ("-m", "bench.compiling"), 60, 120),
        Part("tests", tests, 120, 180, ("pytest",)),
        Part("verify", (*command, "verify", "--quick", "--json"), 40, 60, ("gpukernels.verify",)),
        Part("kernels", (*kernels, "--no-compiled", "--rounds", "10"), 120, 200, ("bench.kernels",)),
        Part("generate", ("-m", "bench.generate", "--json", JSON), 90, 150, ("bench.generate", "transformers")),
        Part("memory", ("-m", "bench.memory", "--preset", "gpt2", "--rounds", "1"), 40, 60, ("bench.memory",)),
        Part("train", ("-m", "bench.train"), 60, 90, ("bench.train",)),
        Part("compiled", (*kernels, "--quick"), 120, 600, ("bench.kernels",)),  # torch.compile, if there is time
    ]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part for at most so many seconds (and its own most): what it found, even when it was cut short."""
    found: dict[str, Any] = {"name": part.name, "command": shown(part)}
    missing = part.missing()
    if missing:
        return found | {"state": "not there", "why": f"needs {', '.join(missing)}"}
    limit = min(part.most, seconds)
    if limit <= 0:
        return found | {"state": "no time"}
    with tempfile.TemporaryDirectory() as scratch:
        figures, printed = Path(scratch) / "figures.json", Path(scratch) / "printed.txt"
        command = [sys.executable, *(str(figures) if each == JSON else each for each in part.command)]
        # From a plain checkout: nothing is installed.
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        start = time.monotonic()
        with printed.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
                state = "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                code, state = None, "cut short"
            finally:
                _end(process)  # and whatever it has started
        found |= {"state": state, "code": code, "seconds": round(time.monotonic() - start, 1)}
        lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
        result = _parsed(figures.read_text(encoding="utf-8")) if figures.exists() else None
        if result is None and lines:
            result = _parsed(lines[-1])
            lines = lines[:-1] if result is not None else lines
    return found | {"result": result, "tail": lines[-_TAIL:]}


def shown(part: Part) -> str:
    return shlex.join(["python", *("FILE" if each == JSON else each for each in part.command)])


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started: they are one group."""
    for kind, wait in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not
        return False
