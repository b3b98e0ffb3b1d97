"""Capturing where there is no CUDA: what torch is asked, in which order."""

import contextlib
import gc
import types

import pytest
import torch

from model.graph import _CudaCapture


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as capturing uses it; whether a capture is under way."""
    here = types.SimpleNamespace(captures=False)

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def capturing(graph, *, pool, stream, capture_error_mode):
        here.captures = True
        yield
        here.captures = False

    for name, value in {
        "device": contextlib.nullcontext, "stream": contextlib.nullcontext, "Stream": Stream, "CUDAGraph": Graph,
        "current_stream": Stream, "graph": capturing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return here


def test_what_is_left_alone_is_not_collected_into_a_graph(cuda):
    """The rows that it releases are another decoder's memory, which every replay would write to."""
    released = []

    def stream():
        try:
            yield
        finally:
            released.append(cuda.captures)

    def step():
        text = stream()
        next(text)
        left = [text]
        left.append(left)  # found by the collector, and by nobody else
        del text, left
        return [[] for _ in range(2 * gc.get_threshold()[0])]  # so many that it has started by now, if it may

    _CudaCapture(torch.device("cuda:0"))(step)
    gc.collect()
    assert released == [False, False]
    assert gc.isenabled()


def test_after_a_capture_that_fails_garbage_is_collected(cuda):
    def step():
        if cuda.captures:
            raise ValueError("no step")

    with pytest.raises(ValueError, match="no step"):
        _CudaCapture(torch.device("cuda:0"))(step)
    assert gc.isenabled()
