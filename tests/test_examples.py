"""The short programs of bench/examples, each run as a user runs it."""

import runpy
import sys
import types

import numpy as np
import pytest
import torch
from test_interop import Array

import gpukernels
import model


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs one with these arguments; what it prints."""

    def printed(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(f"bench.examples.{name}", run_name="__main__")
        return capsys.readouterr().out

    return printed


def test_stream(example):
    lm = model.load("tiny-gpt2", device="auto", dtype="auto")
    options = {"max_new_tokens": 40, "temperature": 0.8, "top_p": 0.95, "seed": 1}
    assert example("stream") == "In the beginning" + lm.generate("In the beginning", **options).text + "\n"
    assert example("stream", "tiny-gpt2", "And God").startswith("And God")


def test_half_memory(example):
    lines = example("half_memory").splitlines()
    assert lines[0].startswith("float32: 23.7 MB of weights:")
    assert lines[1].startswith("float16: 11.8 MB of weights:")
    assert lines[2].startswith("float16 takes 50% of the memory, and says ")


class CupyArray(Array):
    """As much of CuPy's array as the example needs, on the CPU."""

    def reshape(self, *shape):
        return CupyArray(self.tensor.reshape(shape))

    def astype(self, dtype):
        return CupyArray(self.tensor.to(getattr(torch, dtype)))

    def max(self):
        return self.tensor.max()

    @property
    def __array_namespace__(self):
        raise AttributeError("CuPy's arrays have none")


CupyArray.__module__ = "cupy.core"


def largest():
    x = np.arange(64 * 768, dtype=np.float64).reshape(64, 768)
    y = gpukernels.layer_norm(x, np.ones(768), np.zeros(768))
    return gpukernels.gelu(y).max()


def test_from_cupy(example, monkeypatch):
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
    cupy = types.SimpleNamespace(
        cuda=types.SimpleNamespace(runtime=runtime),
        arange=lambda count: CupyArray(torch.arange(count)),
        ones=lambda count, dtype: CupyArray(torch.ones(count)).astype(dtype),
        zeros=lambda count, dtype: CupyArray(torch.zeros(count)).astype(dtype),
        from_dlpack=lambda capsule: CupyArray(torch.from_dlpack(capsule)),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert example("from_cupy") == f"cupy (64, 768) float32, largest {largest():.4f}\n"


def test_from_cupy_without_cupy(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    told = example("from_cupy").splitlines()
    assert told[0] == "CuPy has no GPU here (ModuleNotFoundError); the same calls on NumPy:"
    assert told[1] == f"numpy (64, 768) float32, largest {largest():.4f}"
