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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
JSON = "{json}"  # in a command: the file that the part keeps its figures in

_TAIL = 40  # lines kept of what a part prints
_GRACE = 2.0  # seconds between asking a part to end and ending it
_KILL = 10.0  # seconds that the system has to end it
_LOOK = 5.0  # seconds between looks at a part's figures


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
    kernels, generate = (("-m", f"bench.{name}", "--json", JSON) for name in ("kernels", "generate"))
    needs = ("torch", "triton")
    judged = (*needs, "transformers")
    return [
        Part("compile", ("-m", "bench.compiling"), 60, 120, needs),
        Part("tests", ("-m", "bench.gpu_tests", "--json", JSON), 120, 180, (*needs, "pytest")),
        Part("verify", ("-m", "bench.verifying", "--json", JSON), 60, 120, needs),
        Part("kernels", (*kernels, "--no-compiled", "--rounds", "10"), 120, 200, needs),
        Part("generate", generate, 110, 150, judged),  # of it two starts of five processes
        Part("stages", ("-m", "bench.stages"), 15, 40, needs),
        Part("memory", ("-m", "bench.memory", "--preset", "gpt2", "--rounds", "1"), 40, 60, ("torch",)),
        Part("train", ("-m", "bench.train"), 60, 90, needs),
        Part("llama", (*generate, "--preset", "llama-3.2-1b", "--case", "1x128+128"), 50, 90, judged),
        # Late, and by itself: a barrier that is wrong would wait for ever.
        Part("persistent", (*generate, "--preset", "gpt2", "--case", "1x128+128", "--persistent"), 50, 90, judged),
        Part("compiled", (*kernels, "--quick"), 120, 600, needs),  # torch.compile, if there is time
    ]


def run(part: Part, seconds: float, keep: Callable[[dict[str, Any]], None] = lambda found: None) -> dict[str, Any]:
    """Runs a part for at most so many seconds (and its own most): what it found, even when it was cut short.

    Args:
        keep: is given what there is whenever the part has written figures, and when this is interrupted.
    """
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
        # From a plain checkout: nothing is installed. What a part has said is there when it is ended, too.
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()

        def left(state: str, code: int | None) -> dict[str, Any]:
            known = {"state": state, "code": code, "seconds": round(time.monotonic() - start, 1)}
            return found | known | _left(figures, printed)

        with printed.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = _waited(process, start + limit, figures, lambda: keep(left("running", None)))
                state = "cut short" if code is None else "done" if code == 0 else "failed"
            except BaseException:  # Ctrl-C, or a signal: what there is is kept
                _end(process)
                keep(left("cut short", None))
                raise
            finally:
                _end(process)  # and whatever it has started
        return left(state, code)


def _waited(process: subprocess.Popen, end: float, figures: Path, changed: Callable[[], None]) -> int | None:
    """The exit code, None where the time was up; `changed` is called when there are other figures."""
    seen = None
    while True:
        rest = end - time.monotonic()
        try:
            return process.wait(max(0.0, min(_LOOK, rest)))
        except subprocess.TimeoutExpired:
            if rest <= _LOOK:
                return None
        now = figures.stat().st_mtime_ns if figures.exists() else None
        if now != seen:
            seen = now
            changed()


def _left(figures: Path, printed: Path) -> dict[str, Any]:
    """What a part has found so far, and the last lines of what it has printed."""
    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    result = _parsed(figures.read_text(encoding="utf-8")) if figures.exists() else None
    # The last line, but for what libraries say when a process ends.
    for line in reversed(lines[-_TAIL:]):
        if (last := _parsed(line)) is not None:
            result = last if result is None else result
            lines.remove(line)
            break
    return {"result": result, "tail": lines[-_TAIL:]}


def shown(part: Part) -> str:
    return shlex.join(["python", *("FILE" if each == JSON else each for each in part.command)])


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started: they are one group."""
    for kind, wait in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _KILL)):
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
