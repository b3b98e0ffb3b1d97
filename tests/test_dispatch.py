"""What `gpukernels env` says of this machine, and of the ops: it is what the ops do."""

import json
import os
import sys

import numpy as np
import pytest
import torch

import gpukernels
from gpukernels.dispatch import Choice, choices
from gpukernels.ops import checks
from model import machine
from model.cli import main
from model.cli.env import _document, _lines


def test_numpy_runs_numpy():
    found = choices(None)
    assert found.keys() == {name for name in gpukernels.__all__ if callable(getattr(gpukernels, name))} - {"uniform"}
    assert found["linear"]["float32"] == Choice("NumPy", "the arrays are NumPy's")
    assert found["linear"]["bfloat16"].runs is None


def test_tensors_on_the_cpu_run_plain_torch(monkeypatch):
    found = choices("cpu")
    assert found["gelu"]["float16"] == Choice("plain torch", "tensors on the CPU")
    assert found["gelu"]["float64"] == Choice("plain torch", "no kernel computes in 64 bits")
    # As under TRITON_INTERPRET, and as without Triton.
    monkeypatch.setattr(checks, "kernel_devices", {"cpu"})
    found = choices("cpu")
    why = "TRITON_INTERPRET is set: tensors on the CPU of up to 32 bits"
    assert found["gelu"]["float16"] == Choice("Triton kernels", why)
    assert found["gelu"]["float64"].runs == "plain torch"
    assert found["attention"]["float16"].why.endswith("heads up to 256 wide; plain torch runs wider ones")
    monkeypatch.setattr(checks, "kernel_devices", set())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choices("cpu")["gelu"]["float16"] == Choice("plain torch", "Triton is not installed")


def test_the_machine():
    cpu = machine.processor()
    assert cpu["cores"] >= cpu["usable_cores"] >= 1
    assert machine.memory() > 2**28
    assert machine.version("numpy") == np.__version__
    assert machine.version("no-such-package") is None
    blas = machine.blas()
    if "openblas" in blas["name"] and sys.platform == "linux":
        assert 1 <= blas["threads"] <= os.cpu_count()
    assert machine.driver_version() is None or "." in machine.driver_version()


def test_a_gpu_is_described(monkeypatch):
    properties = {
        "name": "NVIDIA H100",
        "major": 9,
        "minor": 0,
        "total_memory": 80 * 2**30,
        "multi_processor_count": 132,
    }
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: type("Properties", (), properties))
    monkeypatch.setattr(machine, "driver_version", lambda: "580.1")
    monkeypatch.setattr("model.cli.env.choices", lambda device: choices(None if device != "cuda" else "cpu"))
    lines = dict(_lines(_document(None)))
    assert lines["cuda:0"] == "NVIDIA H100, compute capability 9.0, 85.90 GB, 132 multiprocessors"
    assert lines["NVIDIA driver"] == "580.1"
    assert lines["device=auto runs"].startswith("Triton kernels on cuda:0")


def test_a_document_for_a_bug_report(monkeypatch, capsys):
    monkeypatch.setattr("model.cli.env.why_no_cuda", lambda: "there is no NVIDIA driver on this machine")
    monkeypatch.setattr(sys, "argv", ["gpukernels", "env", "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    document = json.loads(capsys.readouterr().out)
    assert end.value.code in (0, None)
    assert document["ops"]["attention"]["float32"] == {"runs": "NumPy", "why": "the arrays are NumPy's"}
    assert document["blas"]["name"]
    assert document["memory"] == machine.memory()
    assert document["gpus"] == []
