"""A provider in a process of its own, so that runtimes timed side by side do not disturb one another.

Thread pools wait for work by spinning: in one process, each runtime's threads would still hold the cores
when the next one's turn comes. Here all but one are asleep on a pipe.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """Calls methods of the object that `make(*arguments)` builds in another process.

    What goes wrong there is a RuntimeError here.
    """

    def __init__(self, make: Callable[..., object], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """What the method returns, and the seconds it took over there."""
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with code {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[..., object], arguments: tuple) -> None:
    try:
        provider = make(*arguments)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            start = time.perf_counter()
            result = getattr(provider, method)(*arguments)
            pipe.send((result, time.perf_counter() - start))
    except EOFError:
        return
    except Exception as fault:
        pipe.send(RuntimeError(f"{type(fault).__name__}: {fault}"))
