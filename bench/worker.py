"""A provider in a process of its own, so that runtimes timed side by side do not disturb one another.

Thread pools wait for work by spinning: in one process, each runtime's threads would still hold the cores
when the next one's turn comes. Here all but one are asleep on a pipe. And on a GPU an illegal access, which a process
does not recover from, is a matter of one.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

_STARTS = 2  # of a worker that fails
_PATIENCE = 10.0  # seconds that a process may take to end


class Worker:
    """Calls methods of the object that `make(*arguments)` builds in another process.

    What goes wrong there is a RuntimeError here, and the end of that process.
    """

    def __init__(self, make: Callable[..., object], *arguments: Any, ready: bool = True):
        """ready: wait until it is built; else `wait` does."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        if ready:
            self.wait()

    def wait(self) -> None:
        """Until the object is built."""
        self._receive()

    def call(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """What the method returns, and the seconds it took over there."""
        try:
            self._pipe.send((method, arguments))
        except OSError:  # it has ended
            raise self._ended() from None
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _ended(self) -> RuntimeError:
        self._process.join(_PATIENCE)
        return RuntimeError(f"its process ended with code {self._process.exitcode}")


class Workers:
    """Some workers by name, which start side by side; one that has failed starts again, once.

    Attributes:
        faults: of those that do not run any more, what they said last.
    """

    def __init__(self, makes: Mapping[str, tuple], start: Callable[..., Worker] = Worker):
        """makes: what each is built by, and its arguments."""
        self._makes, self._start = makes, start
        self._running: dict[str, Worker] = {}
        self._starts: Counter[str] = Counter()
        self.faults: dict[str, str] = {}

    def start(self, names: Iterable[str]) -> None:
        """Starts those of them that do not run, and waits until they do."""
        new = [name for name in names if name not in self._running and name not in self.faults]
        for name in new:
            self._running[name] = self._start(*self._makes[name], ready=False)
            self._starts[name] += 1
        for name in new:
            try:
                self._running[name].wait()
            except RuntimeError as fault:  # it would again
                self._starts[name] = _STARTS
                self._failed(name, fault)

    def call(self, name: str, method: str, *arguments: Any) -> tuple[Any, float]:
        """As `Worker.call`; RuntimeError also for one that has failed, until it is started again."""
        if name not in self._running:
            raise RuntimeError(self.faults.get(name, "its process has ended"))
        try:
            return self._running[name].call(method, *arguments)
        except RuntimeError as fault:
            self._failed(name, fault)
            raise

    def close(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._running:
                self._running.pop(name).close()

    def _failed(self, name: str, fault: RuntimeError) -> None:
        self._running.pop(name).close()
        if self._starts[name] == _STARTS:
            self.faults[name] = str(fault)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(self._makes)


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
