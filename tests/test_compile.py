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


def products(dtype, *shapes):
    """Linears of 8192 rows, forward and backward: (N, K), an activation, and what else is fused."""
    for (N, K), activation, fused in shapes:
        x, weight = meta(8192, K, dtype=dtype), meta(N, K, dtype=dtype)
        more = {"bias": (N,), "residual": (8192, N)}
        more = {name: meta(*more[name], dtype=dtype) for name in fused}
        backward([gpukernels.linear(x, weight, **more, activation=activation)], [x, weight, *more.values()])


GPT2 = [((2304, 768), None, ["bias"]), ((3072, 768), "gelu_new", ["bias"]), ((768, 3072), None, ["bias", "residual"])]


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
    "products of GPT-2": lambda: products(torch.float16, *GPT2),
    "a product in bfloat16": lambda: products(torch.bfloat16, ((3072, 768), "gelu", ["bias"])),
    "products in float32, of a float16 weight": lambda: inference(torch.float32),
    "products in float16, without gradients": lambda: inference(torch.float16),
    "gradients that add up": accumulation,
}

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS = {"_product_kernel", "_product_descriptor_kernel"}
#: Kernels that may spill more, and why.
SPILLING: dict[str, tuple[int, str]] = {}


def wide_enough(launch: Launch) -> bool:
    """Something is loaded or stored 16 bytes at a time."""
    return launch.compiled.count("LDG.E.128", "STG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "UTMALDG") > 0


def operands(launch: Launch) -> set[torch.dtype]:
    """The dtypes of a product's two operands, its first arguments: tensors, or descriptors of some."""
    return {getattr(each, "base", each).dtype for each in launch.arguments[:2]}


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
        if launch.kernel in PRODUCTS and operands(launch) <= {torch.float16, torch.bfloat16}:
            assert compiled.tensor_core_instructions, f"{launch.kernel} has no tensor-core instruction"


def test_every_kernel_is_compiled():
    written = {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    for capability in CHIPS:
        launches = [launch for workload in WORKLOADS.values() for launch in record(workload, capability=capability)]
        # Tensor descriptors are what TMA takes, which came with sm_90.
        want = {name for name in written if capability >= 90 or "_descriptor_" not in name}
        assert {launch.kernel for launch in launches} == want


def test_a_recording_refuses_an_unknown_gpu():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        record(lambda: None, capability=70)


def test_recording_leaves_the_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, capability=80)
    assert driver._active is before
