"""Calls of CUDA that a torch device makes, where there is no CUDA: on which stream, and from which memory."""

import json
from types import SimpleNamespace

import pytest
import torch

from model import PRESETS, ModelError
from model.device import NumpyDevice, TorchDevice
from model.footprint import footprint
from model.memory import predict
from model.persistent import graph_decoder


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda of a machine with two GPUs, the second of which is current; what was asked of it."""
    asked = []

    class Event:
        def record(self, stream):
            asked.append(("recorded", stream))

        def synchronize(self):
            asked.append("waited")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **rest: empty(*shape, **rest))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    return asked


def test_a_device_stays_the_one_that_was_current(cuda):
    assert TorchDevice("cuda").device == torch.device("cuda", 1)
    assert TorchDevice("cuda").name == "cuda"
    assert TorchDevice("cuda:0").device == torch.device("cuda", 0)


def test_tokens_are_awaited_on_the_stream_of_their_own_device(cuda):
    device = TorchDevice("cuda:0")
    read = device.fetch(torch.tensor([3, 4]))
    assert cuda == [("recorded", "stream of cuda:0")]
    assert read() == [3, 4]
    assert cuda[1:] == ["waited"]


def test_indices_travel_from_pinned_memory(cuda):
    device = TorchDevice("cuda:0")
    device.device = torch.device("cpu")  # where they can be looked at
    found = device.indices([range(3), (5, 6, 7)])
    assert found.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert found.dtype == torch.int32
    assert cuda == ["pinned"]


def test_a_gpu_that_was_current_stays_the_one_that_is_asked_about(cuda, monkeypatch):
    """Whether a persistent step is faster on it, and what a model takes there, in another process."""
    device, asked = TorchDevice("cuda"), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "A GPU")
    monkeypatch.setattr("model.persistent.FASTER", {"Another GPU": "measured"})
    graph_decoder(SimpleNamespace(device=device), None)
    assert asked == [torch.device("cuda", 1)]

    def told(command, **options):
        asked.append(json.loads(command[-1])["device"])
        return SimpleNamespace(returncode=0, stdout='{"problems": []}')

    monkeypatch.setattr("model.footprint.require", lambda *arguments: None)
    monkeypatch.setattr("subprocess.run", told)
    for place, on in (("cuda", device), ("torch", TorchDevice("cpu")), ("numpy", NumpyDevice())):
        with pytest.raises(ModelError):
            footprint(PRESETS["gpt2"], on, predict(PRESETS["gpt2"], "float32", place))
    assert asked[1:] == ["cuda:1", "torch", "cpu"]
