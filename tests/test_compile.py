"""What every kernel compiles to, on four generations of GPU, from the launches that the ops really make.

No GPU is needed: `compile_report.record` compiles and does not run. The budgets: at most 16 bytes of
spills a thread, shared memory within the chip's, tensor cores wherever there is a 16-bit product, and
16-byte accesses in what moves the data.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from workloads import WORKLOADS, meta

import gpukernels
from gpukernels.compile_report import CHIPS, Launch, record

SPILL = 16  # bytes a thread: a few registers' worth, which the first-level cache absorbs

KERNELS = Path(gpukernels.__file__).parent / "kernels"

#: Kernels whose products are the point: with 16-bit inputs each must use tensor cores.
PRODUCTS = {
    "_attention_backward_keys_kernel",
    "_attention_backward_queries_kernel",
    "_attention_forward_kernel",
    "_decode_group_kernel",
    "_few_rows_kernel",
    "_product_descriptor_kernel",
    "_product_kernel",
}
#: Kernels that move a few bytes only.
NARROW = {"_document_bounds_kernel"}
#: Kernels that may spill more, and why.
SPILLING: dict[str, tuple[int, str]] = {
    "_rope_kernel": (32, "the product with 2/pi, in integers, of an angle above 105615, in CUDA's sine and cosine"),
}


def wide_enough(launch: Launch) -> bool:
    """Something is loaded or stored 16 bytes at a time."""
    # An eviction policy stands inside the name: LDG.E.EF.128.
    return any(re.match(r"(LDG|STG|LDGSTS)\b.*\.128|UTMALDG", name) for name in launch.compiled.instructions)


def operands(launch: Launch) -> set[torch.dtype]:
    """The dtypes of a product's first two arrays: tensors, or descriptors of some."""
    arrays = [getattr(each, "base", each) for each in launch.arguments.values()]
    return {each.dtype for each in [each for each in arrays if isinstance(each, torch.Tensor)][:2]}


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
        if launch.kernel in PRODUCTS and operands(launch) <= {torch.float16, torch.bfloat16}:
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
