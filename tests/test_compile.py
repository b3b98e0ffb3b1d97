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
from gpukernels.kernels.matmul import long_product

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


def attention(heads, width, dtype=torch.float16, **options):
    q, k, v = meta(4, 1024, 3, heads, width, dtype=dtype).unbind(2)
    backward([gpukernels.attention(q, k, v, **options)], [q, k, v])


def attention_of_every_kind():
    """Grouped heads, a window, lengths and documents: everything that adds code."""
    q, k, v = meta(4, 256, 32, 128), meta(4, 1024, 8, 128), meta(4, 1024, 8, 128)
    lengths, documents = (meta(*shape, dtype=torch.int32, grad=False) for shape in [(4,), (4, 1024)])
    out = gpukernels.attention(q, k, v, window=512, lengths=lengths, documents=documents)
    backward([out], [q, k, v])


def linears(rows, dtype):
    """GPT-2's products: each of its shapes once, forward and backward, with what is fused there."""
    x, hidden = meta(rows, 768, dtype=dtype), meta(rows, 3072, dtype=dtype)
    qkv, up, down = (meta(*shape, dtype=dtype) for shape in [(2304, 768), (3072, 768), (768, 3072)])
    for y, inputs in (
        (gpukernels.linear(x, qkv, meta(2304, dtype=dtype)), [x, qkv]),
        (gpukernels.linear(x, up, bias := meta(3072, dtype=dtype), activation="gelu_new"), [x, up, bias]),
        (gpukernels.linear(hidden, down, residual=x), [hidden, down, x]),
    ):
        backward([y], inputs)


def inference(dtype):
    with torch.no_grad():
        x, half = meta(64, 768, dtype=dtype), meta(3072, 768)
        gpukernels.linear(x, half, meta(3072), activation="gelu")
        gpukernels.matmul(meta(8, 64, 80, dtype=dtype), meta(8, 80, 64, dtype=dtype))  # a batch, and a short tail of K


def accumulation():
    """A chunk of a tied head's gradient, added to a float32 total."""
    total = meta(50304, 768, dtype=torch.float32, grad=False)
    long_product(meta(1024, 50304, grad=False).T, meta(1024, 768, grad=False), out=total, accumulate=True)
    long_product(meta(8192, 768, grad=False).T, meta(8192, 768, grad=False), out=total[:768], accumulate=True)


#: By name: what is launched, on sizes that models have. Together they reach every kernel.
WORKLOADS = {
    "norms of GPT-2": lambda: norms(768, torch.float16),
    "norms of GPT-2 XL": lambda: norms(1600, torch.bfloat16),
    "norms of rows wider than registers": lambda: norms(20000, torch.float32),
    "attention of GPT-2": lambda: attention(12, 64),
    "attention of GPT-2 in float32": lambda: attention(12, 64, torch.float32),
    "attention of LLaMA": lambda: attention(32, 128, torch.bfloat16),
    "attention, 256 wide": lambda: attention(8, 256),
    "attention of every kind": attention_of_every_kind,
    "products of GPT-2": lambda: linears(8192, torch.float16),
    "products in bfloat16": lambda: linears(8192, torch.bfloat16),
    "products in float32, of a float16 weight": lambda: inference(torch.float32),
    "products in float16, without gradients": lambda: inference(torch.float16),
    "gradients that add up": accumulation,
}

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS = {
    "_attention_backward_keys_kernel",
    "_attention_backward_queries_kernel",
    "_attention_forward_kernel",
    "_product_descriptor_kernel",
    "_product_kernel",
}
#: Kernels that move a few bytes only.
NARROW = {"_document_bounds_kernel"}
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
        if launch.kernel not in NARROW:
            assert wide_enough(launch), f"{launch.kernel}: {dict(compiled.instructions)}"
        half = any(getattr(each, "dtype", None) in (torch.float16, torch.bfloat16) for each in launch.arguments)
        if launch.kernel in PRODUCTS and half:
            assert compiled.tensor_core_instructions, f"{launch.kernel} has no tensor-core instruction"


def test_every_kernel_is_compiled():
    written = {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    # Kernels with tensor descriptors are launched from capability 9.0 on, others in their place before.
    seen = {
        launch.kernel
        for workload in WORKLOADS.values()
        for capability in (80, 90)
        for launch in record(workload, capability=capability)
    }
    assert seen == written


def test_a_recording_refuses_an_unknown_gpu():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        record(lambda: None, capability=70)


def test_recording_leaves_the_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, capability=80)
    assert driver._active is before


def test_attention_of_gpt2_on_hopper_multiplies_in_warp_groups_and_loads_by_descriptor():
    for launch in record(WORKLOADS["attention of GPT-2"], capability=90):
        if launch.kernel in PRODUCTS:
            assert launch.compiled.count("HGMMA") == launch.compiled.tensor_core_instructions > 0
            assert launch.compiled.count("UTMALDG") > 0
