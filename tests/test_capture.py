"""Capturing and giving back, where there is no CUDA: what torch is asked, in which order."""

import contextlib
import gc
import threading
import types

import pytest
import torch
from decoding import lively, replayed

from model import language_model
from model.graph import CudaCapture


class Stream:
    device_index = 3

    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as capturing uses it; whether a capture is under way, the current stream, and what was asked."""
    here = types.SimpleNamespace(captures=False, current=Stream(), log=[])
    handles = iter(["a pool", "another"])

    @contextlib.contextmanager
    def on(stream):
        before, here.current = here.current, stream
        try:
            yield
        finally:
            here.current = before

    @contextlib.contextmanager
    def capturing(graph, *, pool, stream, capture_error_mode):
        """As torch before 2.12: one that fails stays where it was, and says what CUDA says at the end."""
        here.log.append(f"capture into {pool}")
        here.captures, here.current, before = True, stream, here.current
        try:
            yield
        except ValueError:
            raise RuntimeError("failed due to a previous error during capture") from None
        finally:
            here.captures = False
        here.current = before

    for name, value in {
        "device": contextlib.nullcontext, "stream": on, "Stream": Stream, "CUDAGraph": Graph,
        "current_stream": lambda: here.current, "graph": capturing, "graph_pool_handle": handles.__next__,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name, what in (("_cuda_endAllocateToPool", "end"), ("_cuda_releasePool", "release")):
        monkeypatch.setattr(
            torch._C, name, lambda device, pool, what=what: here.log.append(f"{what} {pool} of {device}")
        )
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

    CudaCapture(torch.device("cuda:0"))(step)
    gc.collect()
    assert released == [False, False]
    assert gc.isenabled()


def test_two_threads_capture_one_after_the_other(cuda):
    device, asked = torch.device("cuda:0"), threading.Event()
    other = threading.Thread(target=lambda: CudaCapture(device)(asked.set))

    def step():
        if cuda.captures:
            other.start()
            assert asked.wait(10)
            other.join(0.2)  # it has run its function, and would capture by now
            cuda.log.append("captured")

    CudaCapture(device)(step)
    other.join()
    assert cuda.log == ["capture into a pool", "captured", "capture into another"]
    assert gc.isenabled()


def test_after_a_capture_that_fails_everything_is_as_it_was(cuda):
    def step():
        if cuda.captures:
            raise ValueError("no step")

    capture, before = CudaCapture(torch.device("cuda:0")), cuda.current
    with pytest.raises(ValueError, match="no step"):
        capture(step)
    assert gc.isenabled()
    assert cuda.current is before
    assert cuda.log == ["capture into a pool", "end a pool of 3", "release a pool of 3"]
    cuda.log.clear()
    for _ in range(2):
        capture(lambda: None)
    assert cuda.log == ["capture into another"] * 2


def test_a_capture_that_torch_has_ended_is_not_ended_again(cuda, monkeypatch):
    """As torch 2.12 does."""

    def end(device, pool):
        raise RuntimeError("not recording to this pool")

    def step():
        if cuda.captures:
            raise ValueError("no step")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    with pytest.raises(ValueError, match="no step"):
        CudaCapture(torch.device("cuda:0"))(step)
    assert cuda.log == ["capture into a pool"]


def test_a_decoder_is_given_back_when_its_work_has_ended(monkeypatch):
    """A row that ends by itself has been fed once more: the next call, on whichever stream, must not meet that step."""
    monkeypatch.setattr(language_model, "can_capture", lambda *arguments: True)
    monkeypatch.setattr("model.graph.CudaCapture", lambda device: replayed)
    lm, started, running = lively(torch.device("cpu")), 0, 0
    first, *others = lm.generate([3, 1, 4], max_new_tokens=9, temperature=1.0, seed=1).tokens
    lm.eos_token_ids = (next(token for token in others if token != first),)
    decoder, device = lm._idle, lm.parameters.device
    decoder.ahead = True
    step, fetch = decoder.step, device.fetch

    def stepped(rows):
        nonlocal started, running
        started, running = started + 1, running + 1
        return step(rows)

    def fetched(array):
        read = fetch(array)

        def waits():
            nonlocal running
            running = max(0, running - 1) if array is not decoder.cache.lengths else 0  # or all that was started
            return read()

        return waits

    monkeypatch.setattr(decoder, "step", stepped)
    monkeypatch.setattr(device, "fetch", fetched)
    result = lm.generate([3, 1, 4], max_new_tokens=9, temperature=1.0, seed=1)
    assert result.finish_reason == "eos"
    assert started == len(result.tokens)  # of which the first is the prompt's, and the last step's is not looked at
    assert lm._idle is decoder
    assert running == 0
