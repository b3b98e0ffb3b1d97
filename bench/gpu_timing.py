"""How long a call takes on a GPU: without the host, with a cold L2 cache, inside a CUDA graph; and with the host.

Every call of a graph has inputs and results of its own, in turn, so many that they pass three times the L2
cache before one comes again: what a call reads comes from memory, as in a model. A graph holds so many calls
that its own start does not count. The launch-included time is that of the same calls made from Python.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from model.graph import capturing

COLD = 3  # times the L2 cache
_TARGET = 5e-3  # seconds of a replay, about
_MOST = 400  # calls in a graph

Call = Callable[[], Any]
Clock = Callable[[], float]  # runs something, and returns the seconds


class Device(Protocol):
    """What timing asks of a device; `Cuda` is the one that measures, tests have another."""

    name: str
    kind: str  # as torch names devices
    l2: int  # bytes
    free: int  # bytes

    def captured(self, calls: Sequence[Call], times: int) -> Clock: ...
    def launched(self, calls: Sequence[Call], times: int) -> Clock: ...
    def peak(self, call: Call) -> tuple[int, float]: ...
    def release(self) -> None: ...
    def alive(self) -> bool: ...


def copies(touched: int, held: int, device: Device) -> int:
    """How many sets of arrays make the L2 cache cold.

    Args:
        touched: bytes that a call reads and writes.
        held: bytes of memory for one set, with what a call keeps for its backward pass.

    Raises:
        torch.OutOfMemoryError: half of the free memory does not hold them.
    """
    count = max(1, -(-COLD * device.l2 // max(touched, 1)))
    if count * held > device.free // 2:
        raise torch.OutOfMemoryError(f"{count} sets of {held} bytes are more than half of {device.free}")
    return count


def repeats(seconds: float, calls: int) -> int:
    """How often a graph goes through its `calls`, of which each takes about `seconds`."""
    wanted = min(max(_TARGET / max(seconds, 1e-9), 1), _MOST)
    return max(1, round(wanted / calls))


class Cuda:
    """torch's current CUDA device. All work is on one stream of its own, as a capture asks it to be."""

    kind = "cuda"

    def __init__(self):
        properties = torch.cuda.get_device_properties()
        self.name, self.l2 = properties.name, properties.L2_cache_size
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)

    @property
    def free(self) -> int:
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def captured(self, calls: Sequence[Call], times: int) -> Clock:
        """A graph of `times` rounds through the calls; the clock gives the seconds of one call."""
        kept: list[Any] = [None] * len(calls)  # results of other calls are not written over
        for call in calls:  # libraries make their handles now, not under capture
            call()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with capturing(graph, pool=pool, stream=self.stream):
            for _ in range(times):
                for i, call in enumerate(calls):
                    kept[i] = call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def clock() -> float:
            torch.cuda._sleep(200_000)  # the GPU waits, so that the graph is there when its turn comes
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / (times * len(calls))

        return clock

    def launched(self, calls: Sequence[Call], times: int) -> Clock:
        return _launched(calls, times, torch.cuda.synchronize)

    def peak(self, call: Call) -> tuple[int, float]:
        """The memory that a call needs beyond what is there before it, and the seconds it takes."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start

    def release(self) -> None:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a device that is not alive, as every call's
            torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Whether this process can go on: a kernel that reads memory that is not there ends CUDA in it for good."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


def _launched(calls: Sequence[Call], times: int, synchronize: Callable[[], None]) -> Clock:
    def clock() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            for call in calls:
                call()
        synchronize()
        return (time.perf_counter() - start) / (times * len(calls))

    return clock
