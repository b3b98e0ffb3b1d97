"""The record of a run: a line of JSON for every step, what a terminal shows meanwhile, a plot at the end.

`log.jsonl` in the run's folder has one object a line:

    {"kind": "step", "step": 12, "loss": 3.21, "rate": 0.0003, "gradient_norm": 1.2, "tokens_per_second": 9100.0, ...}
    {"kind": "evaluation", "step": 12, "validation_loss": 3.3, "perplexity": 27.1, ...}

`step` counts the optimizer steps that are done. A number that is not finite is null, as JSON has no other
way. Each line is in the file before the next step begins. A resumed run goes on in the same file, without the
lines that were written behind the checkpoint that it starts from.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from gpukernels.numbers import whole
from model.errors import CheckpointError, DataError
from model.finetune.plot import plot
from model.finetune.progress import Progress
from model.finetune.trackers import Tracker, installed, make_trackers

NAME = "log.jsonl"


class Log:
    """Takes the records of a run, in order, and passes them on to the file, the terminal and the trackers.

    A context manager: leaving it closes the file and the display, also where training ended with an error.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total: int,
        done: int = 0,
        evaluated: bool = True,
        flops_per_token: float | None = None,
        peak: float | None = None,
        trackers: Sequence[str | Tracker] = (),
        console: Console | None = None,
    ):
        """Opens the log of a run.

        Args:
            folder: of the run; made if it is not there. None: no file is written, and trackers are objects.
            total: optimizer steps of the whole run.
            done: steps that a resumed run begins with; lines behind them are dropped. 0: a new log.
            evaluated: whether the last of them has been evaluated, or will be again.
            flops_per_token: of forward and backward together, for the share of `peak`.
            peak: the device's operations a second, all its processes together; None: no share is shown.
            trackers: "tensorboard", "wandb", or objects of one's own; see `trackers.py`.
            console: where progress is shown; default standard error. `Console(quiet=True)` shows nothing.

        Raises ModelError for a tracker that is not installed, before anything is written, and CheckpointError, here
        and with each record, where the file cannot be written.
        """
        self._trackers = make_trackers(trackers, folder, done=done)
        self._flops, self._peak = flops_per_token, peak
        self._path, self._file = None, None
        self._open = True
        if folder is not None:
            self._path = folder / NAME
            with self._writing():
                folder.mkdir(parents=True, exist_ok=True)
                _cut(self._path, done, evaluated)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._progress = Progress(total, done, console or Console(stderr=True, highlight=False))

    def step(self, record: dict[str, Any]) -> None:
        """An optimizer step.

        Args:
            record: `step`, and what is known of `loss` (a token's mean), `rate`, `gradient_norm`,
                `tokens_per_second`, `memory` (bytes at most so far), `skipped` (steps left out since their
                gradient was not finite), and anything else that JSON holds.
        """
        record = dict(record)
        if self._flops and self._peak and record.get("tokens_per_second"):
            record["peak_share"] = record["tokens_per_second"] * self._flops / self._peak
        self._write("step", record)
        self._progress.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation: `step`, `validation_loss` (nats a token), and anything else; the perplexity is added."""
        loss = record["validation_loss"]
        record = {**record, "perplexity": math.inf if loss >= 700 else math.exp(loss)}
        self._write("evaluation", record)
        self._progress.evaluation(record)

    def note(self, text: str) -> None:
        """A line on the terminal alone."""
        self._progress.note(text)

    def close(self) -> None:
        """Closes file and display, and draws `loss.png`. A second time does nothing."""
        if not self._open:
            return
        self._open = False
        with ExitStack() as stack:  # where one cannot be closed, the others are
            stack.callback(self._draw)
            for tracker in reversed(self._trackers):
                stack.callback(tracker.close)
            self._progress.close()

    def _draw(self) -> None:
        """The plot of the file, which is closed."""
        if self._file is None:
            return
        with suppress(OSError):  # every record was flushed, or its fault was raised then
            self._file.close()
        if not installed("matplotlib"):
            self._progress.note("no plot: matplotlib is not installed")
            return
        try:
            plot(read(self._path), self._path.parent / "loss.png")
        except (OSError, DataError) as fault:  # a full disk, or its half of a line: what ended the run shall be heard
            self._progress.note(f"no plot: {getattr(fault, 'strerror', None) or fault}")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as second:
            if fault is None:
                raise
            fault.add_note(f"and closing the log: {second!r}")  # what ended the run shall be heard

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if not self._open:
            raise ValueError("the log is closed")
        line = {"kind": kind, **{key: _finite(value) for key, value in record.items()}}
        if self._file is not None:
            with self._writing():
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
        for tracker in self._trackers:
            tracker.log(dict(line))  # to do with it what it likes

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise CheckpointError(f"{self._path}: cannot be written: {fault.strerror or fault}") from None


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in order; DataError, with the line, for one that is none."""
    found = []
    for number, line in enumerate(_lines(path), 1):
        record = _record(line)
        if record is None:
            raise DataError(f"{path}: line {number} is not a record of a run")
        found.append(record)
    return found


def _cut(path: Path, done: int, evaluated: bool) -> None:
    """Leaves the lines of a log up to step `done`, and not the half of one that a kill left."""
    if not path.exists():
        return

    def stays(record: dict[str, Any] | None) -> bool:
        if record is None or record["step"] > done or not done:
            return False
        return evaluated or record["step"] < done or record.get("kind") != "evaluation"

    lines = _lines(path)
    kept = [line for line in lines if stays(_record(line))]
    if kept != lines or not path.read_bytes().endswith(b"\n"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.split("\n") if line]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and record.get("kind") in ("step", "evaluation") and whole(record.get("step"))
    return record if known else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
