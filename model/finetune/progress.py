"""What a user sees of a run: a bar and a line of figures on a terminal, now and then a line elsewhere."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from model.memory import human

_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shows steps and evaluations on `console`, starting behind step `done` of `total`."""

    def __init__(self, total: int, done: int, console: Console):
        self._total, self._first, self._console = total, done, console
        self._start, self._last = time.monotonic(), -_EVERY
        self._validation: dict[str, Any] = {}
        self._live: Live | None = None
        self._pending: str | None = None  # the newest line that was not printed
        if console.is_terminal and not console.quiet:
            self._live = Live(console=console, transient=True, refresh_per_second=4)
            self._live.start()

    def step(self, record: dict[str, Any]) -> None:
        self._pending = line = self.line(record)
        if self._live is not None:
            bar = ProgressBar(total=self._total, completed=record["step"], width=40)
            self._live.update(Group(bar, Text(line, no_wrap=True, overflow="ellipsis")))
        elif time.monotonic() - self._last >= _EVERY or record["step"] in (self._first + 1, self._total):
            self._print(line)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._validation = record
        loss, perplexity = record["validation_loss"], record["perplexity"]
        self._print(f"step {record['step']}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Takes the bar away; the figures of the last step stay."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._pending is not None:
            self._print(self._pending)

    def line(self, record: dict[str, Any]) -> str:
        """The figures of a step that are known, in one line."""
        step = record["step"]
        shown = [f"step {step}/{self._total}"]
        for key, pattern in (
            ("loss", "loss {:.4f}"),
            ("validation_loss", "validation {:.4f}"),
            ("perplexity", "perplexity {:.2f}"),
            ("rate", "rate {:.2e}"),
            ("gradient_norm", "gradient {:.3g}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
            ("peak_share", "{:.1%} of peak"),
        ):
            value = record.get(key, self._validation.get(key))
            if value is not None:
                shown.append(pattern.format(value))
        if record.get("memory"):
            shown.append(human(record["memory"]))
        if record.get("skipped"):
            shown.append(f"{record['skipped']} skipped")
        left = (time.monotonic() - self._start) / max(1, step - self._first) * (self._total - step)
        if left < timedelta.max.total_seconds():  # of more epochs than anyone lives to see
            shown.append(f"{timedelta(seconds=round(left))} left")
        return ", ".join(shown)

    def _print(self, line: str) -> None:
        self._pending, self._last = None, time.monotonic()
        self.note(line)
