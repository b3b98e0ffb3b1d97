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
from gpukernels.kernels.few_rows import few_rows

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


def few(M, N, K, *, norm=True, dtype=torch.float16, bias=True, **options):
    """One product of a decode step: after a norm, or with a residual."""
    x, weight, norm_weight, residual = (
        meta(*shape, dtype=dtype, grad=False) for shape in ((M, K), (N, K), (K,), (M, N))
    )
    few_rows(
        x, weight, meta(N, dtype=dtype, grad=False) if bias else None, residual=None if norm else residual,
        norm=(norm_weight, norm_weight if bias else None, 1e-5, bias) if norm else None, **options,
    )  # fmt: skip


def few_rows_of_gpt2(C, dtype=torch.float16, M=1):
    few(M, 3 * C, C, dtype=dtype)
    few(M, C, C, norm=False, dtype=dtype)
    few(M, 4 * C, C, activation="gelu_new", dtype=dtype)
    few(M, C, 4 * C, norm=False, dtype=dtype)


def few_rows_of_llama():
    few(1, 4096, 4096, bias=False, dtype=torch.bfloat16)
    few(1, 4096, 11008, norm=False, bias=False, dtype=torch.bfloat16)


#: By name: what is launched, on sizes that models have. Together they reach every kernel.
WORKLOADS = {
    "norms of GPT-2": lambda: norms(768, torch.float16),
    "norms of GPT-2 XL": lambda: norms(1600, torch.bfloat16),
    "norms of rows wider than registers": lambda: norms(20000, torch.float32),
    "few rows of GPT-2": lambda: few_rows_of_gpt2(768),
    "few rows of GPT-2's unembedding": lambda: few(1, 50304, 768, bias=False),
    "few rows of GPT-2 XL": lambda: few_rows_of_gpt2(1600),
    "few rows of GPT-2 in float32": lambda: few_rows_of_gpt2(768, torch.float32),
    "few rows of LLaMA": few_rows_of_llama,
}

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS: set[str] = {"_few_rows_kernel"}
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


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("C", [768, 1600])
def test_few_rows_are_one_binary_for_every_number_of_rows(capability, C):
    """That is why a row's bits cannot depend on how many there are."""

    def binaries(M):
        return [launch.compiled.cubin for launch in record(lambda: few_rows_of_gpt2(C, M=M), capability=capability)]

    assert binaries(1) == binaries(2) == binaries(8) == binaries(17) == binaries(64)


# Registers hold the weight in the order of a tensor core: no LDSM, which reads operands from shared memory. By
# its shape: how many 16-byte loads the weight is for a thread, and products.
HELD = [(2304, 768, True, 2 * 3, 6), (768, 768, False, 3, 6), (768, 3072, False, 6, 12), (1600, 1600, False, 7, 14)]


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("N", "K", "norm", "loads", "products"), HELD)
def test_few_rows_load_16_bytes_and_exchange_none(capability, N, K, norm, loads, products):
    (launch,) = record(lambda: few(1, N, K, norm=norm), capability=capability)
    norm_loads = 2 * 3 if norm else 0
    assert launch.compiled.count("LDG.E.128") == loads + norm_loads
    assert launch.compiled.tensor_core_instructions == products
    assert launch.compiled.count("LDSM") == 0


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(("N", "K", "norm"), [(2304, 768, True), (768, 3072, False), (4800, 1600, True)])
def test_a_dependent_kernel_has_its_weight_before_it_waits(capability, N, K, norm):
    (launch,) = record(lambda: few(1, N, K, norm=norm, dependent=True), capability=capability)
    (plain,) = record(lambda: few(1, N, K, norm=norm), capability=capability)
    assert launch.compiled.spilled_bytes <= SPILL
    listing = launch.compiled.listing
    (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
    assert wait < trigger
    loads = [i for i, name in enumerate(listing) if name.startswith("LDG.E.128")]
    assert len(loads) == plain.compiled.count("LDG.E.128")
    assert max(loads) < wait  # the weight and the norm's parameters; not one of them in the loop
    copies = [i for i, name in enumerate(listing) if name.startswith("LDGSTS")]
    assert min(copies) > wait  # x


def test_a_recording_refuses_an_unknown_gpu():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        record(lambda: None, capability=70)


def test_recording_leaves_the_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, capability=80)
    assert driver._active is before
