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


def gelus(width, dtype):
    x = meta(8, 1024, width, dtype=dtype)
    for approximate in ("tanh", "none"):
        backward([gpukernels.gelu(x, approximate=approximate)], [x])


def swiglus(width, dtype):
    gate, up = meta(4, 2048, 2 * width, dtype=dtype).chunk(2, -1)
    backward([gpukernels.swiglu(gate, up)], [gate, up])


def turns(shape, dtype, **options):
    """Queries and keys of a packed projection."""
    batch, new, _, heads, width = shape
    qkv, positions = meta(*shape, dtype=dtype), meta(batch, new, dtype=torch.int64, grad=False)
    q = qkv[:, :, :2].reshape(batch, new, 2 * heads, width)
    backward([gpukernels.rope(q, positions, **options)], [q])


def embeddings(vocabulary, width, dtype):
    ids = meta(8, 1024, dtype=torch.int64, grad=False)
    tables = meta(vocabulary, width, dtype=dtype), meta(1024, width, dtype=dtype)
    backward([gpukernels.embedding(ids, tables[0], positions=ids, position_weight=tables[1])], tables)


#: By name: what is launched, on sizes that models have. Together they reach every kernel.
WORKLOADS = {
    "norms of GPT-2": lambda: norms(768, torch.float16),
    "norms of GPT-2 XL": lambda: norms(1600, torch.bfloat16),
    "norms of rows wider than registers": lambda: norms(20000, torch.float32),
    "GELU of GPT-2": lambda: gelus(3072, torch.float16),
    "SwiGLU of LLaMA-2 7B, packed": lambda: swiglus(11008, torch.bfloat16),
    "embedding of GPT-2": lambda: embeddings(50304, 768, torch.float16),
    "RoPE of LLaMA-2 7B": lambda: turns((2, 4096, 3, 32, 128), torch.bfloat16),
    "RoPE of LLaMA-2 7B, one position": lambda: turns((1, 1, 3, 32, 128), torch.float16),
    "RoPE of a quarter of each head": lambda: turns(
        (2, 2048, 3, 16, 64), torch.float32, frequencies=meta(8, dtype=torch.float32, grad=False)
    ),
    "RoPE of neighbours": lambda: turns((2, 2048, 3, 16, 64), torch.float16, interleaved=True),
}

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS: set[str] = set()
#: Kernels that may spill more, and why.
SPILLING: dict[str, tuple[int, str]] = {
    "_rope_kernel": (32, "the product with 2/pi, in integers, of an angle above 105615, in CUDA's sine and cosine"),
}


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
