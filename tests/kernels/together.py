"""Programs of an interpreted kernel that run together: in turns, in an order drawn at random, so that they can wait.

The interpreter runs one program after the other. Here each has a thread, of which one runs at a time; it hands over
where it does something atomic, and now and then where it loads. A barrier that is wrong shows as another result.
"""

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator

import triton.language as tl  # noqa: F401 (the interpreter exchanges members of what a kernel's file calls tl)
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

_LOADS = 0.02  # of how many loads another program goes on behind


class _Turns:
    """Runs a function once for each program."""

    def __init__(self, programs: int, generator: random.Random):
        self._generator = generator
        self._turns = [threading.Event() for _ in range(programs)]
        self._left = set(range(programs))
        self._ended, self._fault = threading.Event(), None
        self._local = threading.local()

    def run(self, function: Callable[[], None]) -> None:
        threads = [threading.Thread(target=self._program, args=(i, function)) for i in range(len(self._turns))]
        for thread in threads:
            thread.start()
        self._next()
        self._ended.wait()
        if self._fault is not None:
            raise self._fault
        for thread in threads:
            thread.join()

    def hand_over(self) -> None:
        """Called by a program: others may go on for a while."""
        here = self._local.program
        self._turns[here].clear()
        self._next()
        self._wait(here)

    def _program(self, program: int, function: Callable[[], None]) -> None:
        self._local.program = program
        self._wait(program)
        try:
            function()
        except Exception as fault:
            self._fault = fault
            self._ended.set()
        self._left.discard(program)
        if self._left:
            self._next()
        else:
            self._ended.set()

    def _next(self) -> None:
        self._turns[self._generator.choice(sorted(self._left))].set()

    def _wait(self, program: int) -> None:
        self._turns[program].wait()
        interpreter_builder.set_grid_idx(program, 0, 0)


@contextlib.contextmanager
def together(kernel: str, programs: int, seed: int) -> Iterator[None]:
    """While this lasts, the programs of launches of `kernel`, so many in one dimension, run together."""
    generator, turns = random.Random(seed), []
    make, load, atomic = (
        GridExecutor.__init__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_atomic_rmw,
    )

    def made(self, fn, *rest, **options):
        make(self, fn, *rest, **options)
        if fn.__name__ == kernel:
            assert self.grid == (programs,)

            @functools.wraps(fn)
            def all_at_once(**arguments):
                if interpreter_builder.grid_idx[0] == programs - 1:  # the others have been asked for before
                    turns.append(_Turns(programs, generator))
                    turns[-1].run(lambda: fn(**arguments))
                    turns.pop()

            all_at_once.__signature__ = inspect.signature(fn)
            self.fn = all_at_once

    def interrupted_load(self, *arguments, **options):
        if turns and generator.random() < _LOADS:
            turns[-1].hand_over()
        return load(self, *arguments, **options)

    def interrupted_atomic(self, *arguments, **options):
        if turns:
            turns[-1].hand_over()
        return atomic(self, *arguments, **options)

    GridExecutor.__init__ = made
    InterpreterBuilder.create_masked_load = interrupted_load
    InterpreterBuilder.create_atomic_rmw = interrupted_atomic
    try:
        yield
    finally:
        GridExecutor.__init__ = make
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_atomic_rmw = load, atomic
