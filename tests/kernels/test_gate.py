"""The kernels, run, pass the gate in front of `bench.kernels`."""

import pytest
import torch
from kernel_cases import DEVICE
from test_bench_kernels import SMALL

from bench import gate
from bench.rivals import providers
from gpukernels.kernels.device import INTERPRETING


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_the_kernels_pass(case):
    if INTERPRETING and case.dtype == torch.bfloat16:  # whose arithmetic the interpreter of Triton 3.6 has wrong
        case = case._replace(dtype=torch.float16)
    ours = providers(case.op, compiled=False)[0]
    verdicts = gate.judge(case, ours, gate.true(case, DEVICE), DEVICE)
    assert set(verdicts) >= set(case.directions)
    for direction, verdict in verdicts.items():
        assert verdict.right, (direction, verdict)
