"""What every kernel compiles to, on four generations of GPU, from the launches that the ops really make.

No GPU is needed: `compile_report.record` compiles and does not run. The budgets: at most 16 bytes of
spills a thread, shared memory within the chip's, tensor cores wherever there is a 16-bit product, and
16-byte accesses in what moves the data.
"""

import ast
from pathlib import Path

import pytest
import torch

import gpukernels
from gpukernels import library  # noqa: F401
from gpukernels.compile_report import CHIPS, Launch, record

SPILL = 16  # bytes a thread: a few registers' worth, which the first-level cache absorbs

KERNELS = Path(gpukernels.__file__).parent / "kernels"


def meta(*shape, dtype=torch.float16, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(outputs, inputs):
    torch.autograd.grad(outputs, inputs, [torch.empty_like(each) for each in outputs])


def norms(width, dtype):
    x, weight, bias, residual = (
        meta(*shape, dtype=dtype) for shape in [(8192, width), (width,), (width,), (8192, width)]
    )
    backward(gpukernels.layer_norm(x, weight, bias, residual=residual), [x, residual, weight, bias])
    backward([gpukernels.rms_norm(x, weight)], [x, weight])


def decode_attention(heads, kv_heads, width, capacity, dtype):
    q, cache = (
        meta(1, heads, width, dtype=dtype, grad=False),
        meta(1, kv_heads, capacity, width, dtype=dtype, grad=False),
    )
    lengths = meta(1, dtype=torch.int32, grad=False)
    gpukernels.decode_attention(q, cache.transpose(1, 2), cache.transpose(1, 2), lengths)


def sample(vocabulary, padded, dtype, *, draw):
    logits = meta(1, padded, dtype=dtype, grad=False)[:, :vocabulary]
    floats = meta(1, dtype=torch.float32, grad=False)
    integers = meta(1, dtype=torch.int32, grad=False)
    options = dict.fromkeys(("temperature", "top_p", "min_p"), floats) if draw else {}
    options |= dict.fromkeys(("top_k", "seed", "stream", "step"), integers) if draw else {}
    seen = meta(1, padded, dtype=torch.bool, grad=False)[:, :vocabulary]
    gpukernels.sample(logits, **options, repetition_penalty=floats, seen=seen)


#: By name: what is launched, on sizes that models have. Together they reach every kernel.
WORKLOADS = {
    "norms of GPT-2": lambda: norms(768, torch.float16),
    "norms of GPT-2 XL": lambda: norms(1600, torch.bfloat16),
    "norms of rows wider than registers": lambda: norms(20000, torch.float32),
    "decode attention of GPT-2": lambda: decode_attention(12, 12, 64, 1024, torch.float16),
    "decode attention of Llama 3": lambda: decode_attention(32, 8, 128, 8192, torch.bfloat16),
    "decode attention of wide heads": lambda: decode_attention(8, 4, 256, 8192, torch.float32),
    "sampling for GPT-2": lambda: sample(50257, 50304, torch.float16, draw=True),
    "sampling for Llama 3": lambda: sample(128256, 128256, torch.float32, draw=True),
    "greedy choice for GPT-2": lambda: sample(50257, 50304, torch.float32, draw=False),
}

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS: set[str] = {"_decode_group_kernel"}
#: Kernels that may spill more, and why.
SPILLING: dict[str, tuple[int, str]] = {}


def wide_enough(launch: Launch) -> bool:
    """Something is loaded or stored 16 bytes at a time."""
    return launch.compiled.count("LDG.E.128", "STG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "UTMALDG") > 0


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_budgets(name, capability):
    launches = record(WORKLOADS[name], capability=capability)
    assert launches
    for launch in {launch.compiled.cubin: launch for launch in launches}.values():
        compiled = launch.compiled
        most, _ = SPILLING.get(launch.kernel, (SPILL, ""))
        assert compiled.spilled_bytes <= most, f"{launch.kernel} spills {compiled.spilled_bytes} bytes"
        assert compiled.shared_memory <= CHIPS[capability].shared_memory
        assert wide_enough(launch), f"{launch.kernel}: {dict(compiled.instructions)}"
        half = any(getattr(each, "dtype", None) in (torch.float16, torch.bfloat16) for each in launch.arguments)
        if launch.kernel in PRODUCTS and half:
            assert compiled.tensor_core_instructions, f"{launch.kernel} has no tensor-core instruction"


def test_weights_of_the_sampler_are_the_same_on_every_gpu():
    """Their products and sums are rounded one by one: what is fused is the one division of a row, in its two forms."""
    logits, one = meta(1, 50304, grad=False), meta(1, dtype=torch.float32, grad=False)
    options = dict.fromkeys(("temperature", "top_p", "min_p", "uniforms"), one)
    for capability in CHIPS:
        (launch,) = record(lambda: gpukernels.sample(logits, **options), capability=capability)
        assert launch.compiled.count("FFMA") <= 16


def test_every_kernel_is_compiled():
    written = {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    for capability in CHIPS:
        launches = [launch for workload in WORKLOADS.values() for launch in record(workload, capability=capability)]
        assert {launch.kernel for launch in launches} == written


def test_a_recording_refuses_an_unknown_gpu():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        record(lambda: None, capability=70)


def test_recording_leaves_the_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, capability=80)
    assert driver._active is before
