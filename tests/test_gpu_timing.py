"""How a GPU is timed, on a stand-in for `torch.cuda` that writes down what it is asked."""

import contextlib
import types

import pytest
import torch

from bench.gpu_timing import Cuda


@pytest.fixture
def cuda(monkeypatch):
    """A `Cuda` whose GPU takes 6 ms for whatever is replayed; `log` is what it was asked, in order."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 6.0  # ms

    @contextlib.contextmanager
    def graph(made, pool, stream):
        assert (pool, stream.device_index) == ("a pool", 3)
        log.append("capture")
        yield
        log.append("captured")

    properties = types.SimpleNamespace(name="stand-in", L2_cache_size=50 << 20)
    stand_ins = {
        "get_device_properties": lambda: properties,
        "Stream": lambda: types.SimpleNamespace(device_index=3),
        "set_stream": lambda stream: log.append("on a stream"),
        "stream": contextlib.nullcontext,
        "current_stream": lambda: None,
        "graph_pool_handle": lambda: "a pool",
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": graph,
        "Event": Event,
        "synchronize": lambda: log.append("synchronize"),
        "_sleep": lambda cycles: log.append("sleep"),
        "mem_get_info": lambda: (100, 1000),
        "memory_reserved": lambda: 50,
        "memory_allocated": lambda: 30,
        "max_memory_allocated": lambda: 75,
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "empty_cache": lambda: log.append("empty"),
    }
    for name, each in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, each, raising=False)
    device = Cuda()
    device.log = log
    return device


def test_a_graph_has_every_call_and_is_replayed_behind_a_wait(cuda):
    results = []

    def call(name):
        cuda.log.append(name)
        results.append(object())
        return results[-1]

    clock = cuda.captured([lambda: call("a"), lambda: call("b")], 3)
    assert cuda.log == ["on a stream", "a", "b", "synchronize", "capture", *["a", "b"] * 3, "captured"]
    cuda.log.clear()
    assert clock() == pytest.approx(6e-3 / 6)  # 6 ms for 6 calls
    assert cuda.log == ["sleep", "event", "replay", "event", "wait"]


def test_results_of_a_graph_live_until_the_next_round(cuda):
    """Else all calls would write to one place, which the L2 cache keeps."""
    alive, most = set(), []

    class Result:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    clock = cuda.captured([Result] * 5, 4)
    assert max(most) == 6
    del clock
    assert not alive


def test_the_host_is_in_the_launched_time(cuda, monkeypatch):
    ticks = iter([10.0, 10.5])
    monkeypatch.setattr("bench.gpu_timing.time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = cuda.launched([lambda: cuda.log.append("a")] * 2, 5)
    cuda.log.clear()
    assert clock() == pytest.approx(0.5 / 10)
    assert cuda.log == ["synchronize", *["a"] * 10, "synchronize"]


def test_memory(cuda):
    assert cuda.free == 100 + 50 - 30
    nbytes, seconds = cuda.peak(lambda: cuda.log.append("call"))
    assert nbytes == 75 - 30
    assert seconds >= 0
    assert cuda.log[-4:] == ["synchronize", "reset", "call", "synchronize"]
    assert cuda.l2 == 50 << 20
