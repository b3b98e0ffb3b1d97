"""Ctrl-C and SIGTERM as a wish to stop: the step, or batch of an evaluation, is finished; then the run is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """`signal` is the number of the one that came, or None."""

    signal: int | None = None

    def __call__(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # twice is an order
        self.signal = number


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Catches both signals while the context lasts. Only a process's first thread may; in others nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
