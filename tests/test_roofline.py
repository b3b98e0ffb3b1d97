"""Roofs of GPUs, and the times that follow, by hand."""

import pytest
import torch
from workloads import GPT2, WORKLOADS, products

from gpukernels.compile_report import CHIPS, GPUS, Cost, cost, gpu_named, record, roofline


def test_the_slower_of_bytes_and_operations():
    h100 = GPUS["H100"]
    # A decode step's QKV of GPT-2: 3.5 MB of weights; nothing is multiplied often.
    assert roofline(Cost(3_538_944, 4608, 2 * 2304 * 768, True), h100) == pytest.approx(1.0577e-6, rel=1e-3)
    # 8192 cubed: 1.0995e12 operations.
    assert roofline(Cost(2 * 2 * 8192**2, 2 * 8192**2, 2 * 8192**3, True), h100) == pytest.approx(1.1113e-3, rel=1e-3)
    assert roofline(Cost(0, 0, 2 * 8192**3, False), h100) == pytest.approx(16.435e-3, rel=1e-3)


def test_gpus_are_found_by_name():
    assert gpu_named("h100") is GPUS["H100"]
    assert {gpu.capability for gpu in GPUS.values()} <= set(CHIPS)
    with pytest.raises(ValueError, match="must be one of A100, RTX 4090, H100, H200, got 'V100'"):
        gpu_named("V100")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_recorded_launch_has_a_cost(name, capability):
    for launch in record(WORKLOADS[name], capability=capability):
        found = cost(launch)
        assert found.read > 0
        assert found.written > 0
        assert all(roofline(found, gpu) > 0 for gpu in GPUS.values())


def test_a_product_of_gpt2_by_hand():
    """x (8192, 768), weight (2304, 768), bias and result in float16: by descriptors too."""
    for capability in (80, 90):
        forward = record(lambda: products(torch.float16, GPT2[0]), capability=capability)[0]
        rows, N, K = 8192, 2304, 768
        assert cost(forward) == Cost(2 * (rows * K + N * K + N), 2 * rows * N, 2 * rows * N * K, True)
        assert forward.compiled.tensor_core_instructions


def test_a_training_step_moves_what_its_arrays_hold():
    launches = record(WORKLOADS["AdamW of GPT-2"], capability=90)
    size = 124_439_808
    assert cost(launches[0]).written == 3 * 4 * size
    assert abs(cost(launches[0]).read - 4 * 4 * size) < 64
    assert roofline(cost(launches[0]), GPUS["H100"]) > 1e-3
