"""Rivals that need a GPU, as far as they can be called without one: their sums, and how each is asked."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_bench_kernels import SMALL

from bench import gate, rivals
from bench.rivals import OPS, providers


def case_of(op):
    case = next(case for case in SMALL if case.op == op)
    return case._replace(dtype=torch.float32)


@pytest.fixture
def with_a_gpu(monkeypatch):
    """torch says that there is one; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("op", ["attention", "decode_attention"])
def test_every_backend_of_sdpa_is_a_provider_and_gives_the_answer(op, with_a_gpu):
    case = case_of(op)
    there = {each.name: each for each in providers(op, compiled=False)}
    assert list(there) == ["ours", "torch", "SDPA flash", "SDPA cuDNN", "SDPA efficient"]
    for name in ("SDPA flash", "SDPA cuDNN", "SDPA efficient"):
        # The CPU has a kernel of its own behind the same call: what is judged is how we call it.
        verdicts = gate.judge(case, there[name], gate.true(case, "cpu"), "cpu")
        assert all(each.right for each in verdicts.values()), name
        with there[name].context():
            enabled = [
                torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
            ]  # fmt: skip
        assert enabled == [name == each for each in ("SDPA flash", "SDPA cuDNN", "SDPA efficient", "math")]


class Liger(types.ModuleType):
    """The functions that are called, with Liger-Kernel's parameters."""

    @staticmethod
    def liger_layer_norm(X, W, B, eps):
        return F.layer_norm(X, X.shape[-1:], W, B, eps)

    @staticmethod
    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place  # else the upstream gradient is written over
        return F.rms_norm(X, X.shape[-1:], W, eps)

    @staticmethod
    def liger_swiglu(a, b):
        return F.silu(a) * b

    @staticmethod
    def liger_cross_entropy(input, target, weight=None):
        return F.cross_entropy(input, target)

    @staticmethod
    def liger_fused_linear_cross_entropy(input, weight, target, bias=None):
        return F.cross_entropy(F.linear(input, weight), target)


@pytest.mark.parametrize(
    ("op", "capturable"),
    [
        ("layer_norm", True),
        ("rms_norm", True),
        ("swiglu", True),
        ("cross_entropy", False),
        ("linear_cross_entropy", False),
    ],
)
def test_liger_is_asked_for_what_ours_does(op, capturable, with_a_gpu, monkeypatch):
    functional = Liger("liger_kernel.transformers.functional")
    monkeypatch.setattr(rivals, "find_spec", lambda name: functional)
    package, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.transformers, transformers.functional = transformers, functional
    for name, module in (("", package), (".transformers", transformers), (".transformers.functional", functional)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    liger = providers(op, compiled=False)[-1]
    assert (liger.name, liger.capturable) == ("Liger", capturable)
    case = case_of(op)
    assert all(each.right for each in gate.judge(case, liger, gate.true(case, "cpu"), "cpu").values())


def test_liger_that_cannot_be_imported_is_no_end(with_a_gpu, monkeypatch):
    monkeypatch.setattr(rivals, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger = providers("swiglu", compiled=False)[-1]
    with pytest.raises(ImportError):
        liger.run(gate=torch.ones(1, 2), up=torch.ones(1, 2))


def test_without_a_gpu_there_is_ours_and_torch():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert all([each.name for each in providers(op, compiled=False)] == ["ours", "torch"] for op in OPS)


def test_torch_compile_is_of_torchs_function(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append((function, options)) or function)
    names = [each.name for each in providers("gelu", compiled=True)]
    assert names == ["ours", "torch", "torch.compile"]
    assert asked == [(OPS["gelu"].torch, {"fullgraph": True, "dynamic": False})]
