"""The cost of a launch, told from its arguments, against what its loads and stores touch."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
from cost_cases import CASES

import gpukernels
from gpukernels.compile_report.cost import KERNELS, Cost, cost_of
from gpukernels.kernels.device import INTERPRETING

#: With tensor descriptors: the GPU that the interpreter stands for has none. A whole step: test_compile_persistent.py.
NOT_HERE = {"_product_descriptor_kernel", "_persistent_step_kernel"}

WRITTEN = {
    node.name
    for path in (Path(gpukernels.__file__).parent / "kernels").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}


def test_every_kernel_has_a_cost():
    assert set(KERNELS) == WRITTEN
    with pytest.raises(KeyError, match="nothing is known of the kernel _other_kernel"):
        cost_of("_other_kernel", {})


@pytest.fixture(scope="module")
def launches():
    """By case, each launch as it was counted."""
    if not INTERPRETING:
        pytest.skip("loads are counted by the interpreter")
    from traffic import traffic

    found = {}
    for name, case in CASES.items():
        with traffic() as found[name]:
            case()
    return found


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_are_touched(name, launches):
    for each in launches[name]:
        told = cost_of(each.kernel, each.arguments)
        assert told.written == each.written, each.kernel
        if name == "attention of documents":  # of the documents' borders, those of the queries
            assert told.read - 2 * 2 * 20 * 4 <= each.read <= told.read, each.kernel
        else:
            assert told.read == each.read, each.kernel


def test_the_cases_launch_every_kernel(launches):
    assert {each.kernel for group in launches.values() for each in group} == WRITTEN - NOT_HERE


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (3, 9), (9, 3)])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 1), (True, 4), (True, 99)])
def test_scores_are_counted_one_by_one(T, S, causal, window):
    q, k = torch.empty(2, T, 6, 8), torch.empty(2, S, 3, 8)
    arguments = {"q": q, "k": k, "v": k, "out_ptr": q, "lse_ptr": None, "lengths_ptr": None, "bounds_ptr": None}
    arguments |= {"T": T, "S": S, "H": 6, "D": 8, "CAUSAL": causal, "WINDOW": window}

    def seen(i, j):
        p = S - T + i
        return not causal or (p >= 0 and j <= p and (not window or j > p - window))

    pairs = sum(seen(i, j) for i, j in itertools.product(range(T), range(S)))
    assert cost_of("_attention_forward_kernel", arguments).flops == 2 * 6 * pairs * (2 * 2 * 8 + 4)


def test_tensor_cores_are_for_16_bit_products():
    def product(a, b):
        arguments = dict.fromkeys(("bias_ptr", "residual_ptr", "z_ptr")) | {"M": 4, "N": 6, "read_m": 4, "read_n": 6}
        x, weight = torch.empty(4, 5, dtype=a), torch.empty(5, 6, dtype=b)
        return cost_of("_product_kernel", arguments | {"a_ptr": x, "b_ptr": weight, "out_ptr": torch.empty(4, 6)})

    assert product(torch.float16, torch.float16) == Cost(2 * 4 * 5 + 2 * 5 * 6, 4 * 4 * 6, 2 * 4 * 5 * 6, True)
    assert not product(torch.float32, torch.float16).tensor_cores


def test_what_is_expanded_is_read_once():
    x = torch.empty(3, 8)
    arguments = {"gate_ptr": x, "up_ptr": torch.empty(8).expand(3, 8), "y_ptr": x}
    assert cost_of("_swiglu_forward_kernel", arguments).read == 4 * (3 * 8 + 8)
