"""The CUDA side of an upload, its calls of torch and CuPy, where there is no CUDA: they land in cast.cu's own C."""

import contextlib
import ctypes
import weakref

import numpy as np
import pytest
import torch
from cuda_twin import COMPILER, library
from test_cast import samples
from test_upload import reader, wanted

from gpukernels.cast import Upload, count_losses

pytest.importorskip("cupy")


class _Stream:
    cuda_stream = 4096


class _Function:
    """A kernel of CuPy: called with grid, block and arguments."""

    def __init__(self, library, name):
        self._call = getattr(library, name)

    def __call__(self, grid, block, arguments):
        assert block == (256,)
        assert all(type(each) is np.int64 for each in arguments)
        self._call(*map(ctypes.c_longlong, (*grid, *map(int, arguments))))


class _Module:
    def __init__(self, *codes):
        self._library = library(*codes)

    def get_function(self, name):
        return _Function(self._library, name)


@pytest.fixture
def device(monkeypatch):
    from gpukernels.cast import device

    empty, zeros = torch.empty, torch.zeros

    class Event:
        recorded = False

        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded

    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, device=None, **rest: empty(*shape, **rest))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **rest: zeros(*shape, **rest))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(device.cupy.cuda, "Device", contextlib.nullcontext)
    monkeypatch.setattr(device, "_module", _Module)
    monkeypatch.setattr(device, "_for_cupy", lambda stream, index: contextlib.nullcontext())
    return device


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tensor_goes_through_torchs_memory_and_cupys_launches(device, transposed):
    source = samples("F32")[: 500 * 96].reshape(-1, 96)
    side = device.Cuda(torch.device("cuda"))
    upload = Upload(side, 1, dtype="float16", nbytes=1 << 14)
    out = torch.empty(source.shape[::-1] if transposed else source.shape, dtype=torch.float16)
    upload.add(reader(source), "F32", source.shape, out, transposed=transposed)
    assert upload.finish() == [count_losses(source, "F32", "float16")]
    result = out.numpy().T if transposed else out.numpy()
    np.testing.assert_array_equal(result, wanted(source, "F32", "float16"))


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_the_host_grows_by_two_pinned_buffers_and_the_device_by_one(device, monkeypatch):
    made, allocate = [], torch.empty

    def empty(*shape, pin_memory=False, device=None, **rest):
        memory = allocate(*shape, **rest)
        made.append(("host" if pin_memory else device.type, memory.nbytes, weakref.ref(memory)))
        return memory

    monkeypatch.setattr(torch, "empty", empty)
    source, nbytes = samples("F32")[: 500 * 96].reshape(-1, 96), 1 << 12
    upload = Upload(device.Cuda(torch.device("cuda")), 6, dtype="float16", nbytes=nbytes)
    outs = [torch.from_numpy(np.empty(source.shape, np.float16)) for _ in range(6)]
    for out in outs:
        upload.add(reader(source), "F32", source.shape, out, transposed=False)
    upload.finish()
    assert [each[:2] for each in made] == [("host", nbytes)] * 2 + [("cuda", nbytes)]
    assert all(memory() is not None for *_, memory in made), "the device may still read them"
    del upload
    assert all(memory() is None for *_, memory in made)


def test_cupy_is_given_torchs_stream():
    from gpukernels.cast.device import _for_cupy

    assert _for_cupy(_Stream(), 0).ptr == _Stream.cuda_stream
