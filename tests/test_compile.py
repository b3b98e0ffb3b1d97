"""What every kernel compiles to, on four generations of GPU, from the launches that models and ops really make.

No GPU is needed: `compile_report.record` compiles and does not run. The budgets stand in
`gpukernels.compile_report.report`, beside the kernels that may break one, and why.
"""

import ast
from pathlib import Path

import pytest
import torch
from workloads import STEPS, WORKLOADS, backward, meta

import gpukernels
from gpukernels.compile_report import CHIPS, record, rows
from gpukernels.compile_report.report import EXCEPTIONS

KERNELS = Path(gpukernels.__file__).parent / "kernels"


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_budgets(name, capability):
    found = rows(record(WORKLOADS[name], capability=capability), capability)
    assert found
    problems = {(row.kernel, row.constants): row.problems for row in found if row.problems}
    assert not problems


def test_weights_of_the_sampler_are_the_same_on_every_gpu():
    """Their products and sums are rounded one by one: what is fused is the one division of a row, in its two forms.

    And in the search by float32 exponentials, which decides nothing: each of a thread's 8 elements, in two loops.
    """
    logits, one = meta(1, 50304, grad=False), meta(1, dtype=torch.float32, grad=False)
    options = dict.fromkeys(("temperature", "min_p", "uniforms"), one)
    for capability in CHIPS:
        (launch,) = record(lambda: gpukernels.sample(logits, **options), capability=capability)
        assert launch.compiled.count("FFMA") <= 16
        (launch,) = record(lambda: gpukernels.sample(logits, **options, top_p=one), capability=capability)
        assert launch.compiled.count("FFMA") <= 16 + 2 * 8


def test_a_vocabulary_of_one_word_is_sampled():
    """An argument of 1 becomes a constant of the code, which is no tensor; the interpreter makes nothing of it."""
    logits = meta(1, 1, grad=False)
    one, number = (meta(1, dtype=dtype, grad=False) for dtype in (torch.float32, torch.int64))
    options = dict.fromkeys(("temperature", "top_p", "min_p", "uniforms"), one) | {"top_k": number}
    (launch,) = record(lambda: gpukernels.sample(logits, **options), capability=90)
    assert launch.kernel == "_sample_kernel"


#: By op, its arrays of a single element: floats with so many dimensions, integers with so many; other options.
SINGLE = {
    "layer_norm": ({"x": 2, "weight": 1, "bias": 1, "residual": 2}, {}, {}),
    "rms_norm": ({"x": 2, "weight": 1}, {}, {}),
    "linear": ({"x": 2, "weight": 2, "bias": 1, "residual": 2}, {}, {"activation": "gelu_new"}),
    "norm_linear": ({"x": 2, "norm_weight": 1, "norm_bias": 1, "weight": 2, "bias": 1}, {}, {}),
    "matmul": ({"a": 3, "b": 3}, {}, {}),
    "attention": ({"q": 4, "k": 4, "v": 4}, {"lengths": 1, "documents": 2}, {"window": 1}),
    "packed_attention": ({"qkv": 5}, {}, {}),
    "decode_attention": ({"q": 3, "k": 4, "v": 4}, {"lengths": 1}, {"window": 1}),
    "cached_attention": (dict.fromkeys(("q", "k", "v", "keys", "values"), 4), {"lengths": 1}, {"window": 1}),
    "gelu": ({"x": 2}, {}, {}),
    "swiglu": ({"gate": 2, "up": 2}, {}, {}),
    "embedding": ({"weight": 2, "position_weight": 2}, {"ids": 2, "positions": 2}, {}),
    "cross_entropy": ({"logits": 2}, {"targets": 1}, {"label_smoothing": 0.1}),
    "linear_cross_entropy": ({"hidden": 2, "weight": 2}, {"targets": 1}, {}),
}


@pytest.mark.parametrize("op", SINGLE)
def test_sizes_of_1_are_compiled_forward_and_backward(op):
    """As above."""
    floats, integers, options = SINGLE[op]
    gradient = op not in ("decode_attention", "cached_attention")
    given = {name: meta(*[1] * n, grad=gradient) for name, n in floats.items()}
    if op == "packed_attention":
        given["qkv"] = meta(1, 1, 3, 1, 1)
    given |= {name: meta(*[1] * n, dtype=torch.int32, grad=False) for name, n in integers.items()}

    def run():
        with torch.no_grad():
            getattr(gpukernels, op)(**given, **options)
        if gradient:
            results = getattr(gpukernels, op)(**given, **options)
            backward(results if isinstance(results, tuple) else [results], [given[name] for name in floats])

    assert record(run, capability=90)


def test_every_kernel_is_compiled():
    written = {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    # Kernels with tensor descriptors are launched from capability 9.0 on, others in their place before.
    recorded = [(workload, capability) for workload in WORKLOADS.values() for capability in (80, 90)]
    recorded.append((STEPS["gpt2/persistent"], 90))
    found = [row for step, capability in recorded for row in rows(record(step, capability=capability), capability)]
    assert {row.kernel for row in found} == written
    # And no kernel is excused from a budget that it keeps.
    excused = {(row.kernel, text) for row in found for text in row.excused}
    for (kernel, _), reason in EXCEPTIONS.items():
        assert any(name == kernel and text.endswith(reason) for name, text in excused), kernel


def test_a_recording_refuses_an_unknown_gpu():
    with pytest.raises(ValueError, match="capability must be one of 80, 89, 90, 100, got 70"):
        record(lambda: None, capability=70)


@pytest.mark.parametrize("vocabulary", [50257, 50304, 128256])
def test_two_rows_of_a_large_vocabulary_share_a_multiprocessor(vocabulary):
    """And no more: what the first pass over a row has read, the second is to find in the L2 cache."""
    logits = meta(8192, -(-vocabulary // 64) * 64, dtype=torch.bfloat16, grad=False)[:, :vocabulary]
    targets = meta(8192, dtype=torch.int64, grad=False)
    launches = record(lambda: gpukernels.cross_entropy_with_gradient(logits, targets), capability=90)
    (row,) = (row for row in rows(launches, 90) if row.kernel == "_cross_entropy_kernel")
    assert row.resident_blocks == 2


def test_gelu_in_the_epilogue_of_a_product_is_ten_instructions_an_element():
    x, weight = meta(8192, 768, grad=False), meta(3072, 768, grad=False)
    plain, gelu = (
        record(lambda name=name: gpukernels.linear(x, weight, activation=name), capability=90)[0].compiled
        for name in (None, "gelu_new")
    )
    elements = gelu.count("MUFU.EX2")  # of a thread
    assert elements == 128 * 256 // (32 * gelu.num_warps)
    assert len(gelu.listing) - len(plain.listing) <= 11 * elements


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "single"])
@pytest.mark.parametrize("width", [128, 256, 512, 768, 1024, 1600, 2048])
def test_programs_of_a_norms_backward_pass_find_room_together(width, dtype):
    """They divide the rows evenly: what came late would take as long again."""
    x, weight = meta(32768, width, dtype=dtype), meta(width, dtype=dtype)
    launches = record(lambda: backward([gpukernels.layer_norm(x, weight, weight)], [x, weight]), capability=90)
    (row,) = (row for row in rows(launches, 90) if row.kernel == "_norm_backward_kernel")
    assert row.grid[0] <= row.resident_blocks * CHIPS[90].multiprocessors


def test_recording_leaves_the_driver_as_it_was():
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, capability=80)
    assert driver._active is before


def test_attention_of_gpt2_on_hopper_multiplies_in_warp_groups_and_loads_by_descriptor():
    seen = set()
    for launch in record(WORKLOADS["gpt2/training"], capability=90):
        if launch.kernel.startswith("_attention") and "delta" not in launch.kernel:
            seen.add(launch.kernel)
            assert launch.compiled.count("HGMMA") == launch.compiled.tensor_core_instructions > 0
            assert launch.compiled.count("UTMALDG") > 0
    assert len(seen) == 3
