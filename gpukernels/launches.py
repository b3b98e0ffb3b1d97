"""How kernels follow one another on a stream."""

import contextlib
import threading
from collections.abc import Iterator


class _Here(threading.local):
    """Of this thread: another one may launch what this one's caller promises nothing about."""

    dependent = False


_here = _Here()


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """While this lasts, kernels that can do so start before the one in front of them on the stream has ended.

    Programmatic dependent launch, from compute capability 9.0 on; on others nothing changes. A kernel with the
    flag DEPENDENT loads what no kernel of a step writes (weights, biases, norm parameters), then waits for the
    kernel before it; so does every program of it that does anything, and one does. The next kernel may start
    when each program has said so or ended: at once, but that a kernel with a norm says so behind its wait. Two
    things follow, by which each kernel says what it may do:

    - Behind the wait every kernel before has ended, for the one before had itself waited. What they wrote is
      visible, and whoever read what this kernel overwrites is gone: all stores stand behind the wait.
    - From its first instruction on, a kernel knows that all have ended that stand before the last norm in front of
      it, be that a kernel of its own or the beginning of a product. In a step one stands before each layer's
      attention. So `cached_attention` loads lengths and older keys and values early, which nobody writes between
      the end of a step and the new key. They come from the L2 cache: a multiprocessor's own may have a line from
      before.

    Kernels without the flag start when all before them have ended, as ever; so does one that a launcher must copy such
    an array for first. For a decode step: by a probe on an
    H100, 2026-11-22, 3555 tokens/s instead of 2843, and 5391 where keys and values are loaded early and the tiles
    are tuned. How early the next kernel starts was worth 3 microseconds of 206 there, and is to be measured here.

    The caller promises that nothing launched meanwhile writes a weight, lengths right in front of a
    `cached_attention`, or a cache but through it.
    """
    before, _here.dependent = _here.dependent, True
    try:
        yield
    finally:
        _here.dependent = before


def are_dependent() -> bool:
    """Whether launches of this thread are to be dependent ones."""
    return _here.dependent
