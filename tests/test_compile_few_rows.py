"""What makes the few-row kernel what it is, read off its machine code."""

from functools import partial

import pytest
import torch
from workloads import few, few_rows_of_gpt2

from gpukernels.compile_report import CHIPS, record
from gpukernels.launches import dependent_launches


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("C", [768, 1600])
def test_few_rows_are_one_binary_for_every_number_of_rows(capability, C):
    """That is why a row's bits cannot depend on how many there are."""

    def binaries(M):
        return [launch.compiled.cubin for launch in record(lambda: few_rows_of_gpt2(C, M=M), capability=capability)]

    assert binaries(1) == binaries(2) == binaries(8) == binaries(17) == binaries(64)


# Registers hold the weight in the order of a tensor core: no LDSM, which reads operands from shared memory. By
# its shape: how many 16-byte loads the weight is for a thread, and products, of 8 columns and 16 of K each.
HELD = [
    (2304, 768, True, 2 * 3, 12),
    (768, 768, False, 3, 6),
    (768, 3072, False, 6, 12),
    (1600, 1600, False, 7, 14),
    (1600, 6400, False, 25, 50),
]


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("N", "K", "norm", "loads", "products"), HELD)
def test_few_rows_load_16_bytes_and_exchange_none(capability, N, K, norm, loads, products):
    (launch,) = record(lambda: few(1, N, K, norm=norm), capability=capability)
    norm_loads = 2 * 3 if norm else 0
    assert launch.compiled.count("LDG.E.128") == loads + norm_loads
    assert launch.compiled.tensor_core_instructions == products
    assert launch.compiled.count("LDSM") == 0


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize(("N", "K"), [(1152, 576), (2304, 768), (2560, 2048)])
def test_an_rms_norm_in_the_prologue_has_no_mean_and_no_bias_to_load(capability, N, K):
    with dependent_launches():
        (launch,) = record(lambda: few(1, N, K, bias=False), capability=capability)
    compiled, pieces = launch.compiled, -(-K // 256)
    assert launch.arguments["norm_weight_ptr"] is not None
    assert compiled.spilled_bytes == 0
    assert compiled.count("LDG.E.128") == pieces * launch.arguments["BLOCK_N"] // 8 + pieces
    layer = record(lambda: few(1, N, 768), capability=capability)[0].compiled  # which has two sums over a row
    assert layer.count("SHFL") > compiled.count("SHFL")
    assert layer.count("BAR") > compiled.count("BAR")


@pytest.mark.parametrize("capability", CHIPS)
def test_the_widest_norm_in_front_of_a_product_in_float32_finds_registers(capability):
    step = partial(few, 1, 6400, 1600, dtype=torch.float32, activation="gelu_new")
    (launch,) = record(step, capability=capability)
    assert launch.compiled.spilled_bytes <= 16
    assert launch.compiled.shared_memory <= CHIPS[capability].shared_memory


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    ("N", "K", "norm"), [(2304, 768, True), (768, 3072, False), (4800, 1600, True), (1600, 6400, False)]
)
def test_a_dependent_kernel_has_its_weight_before_it_waits(capability, N, K, norm):
    with dependent_launches():
        (launch,) = record(lambda: few(1, N, K, norm=norm), capability=capability)
    (plain,) = record(lambda: few(1, N, K, norm=norm), capability=capability)
    assert launch.compiled.spilled_bytes <= 16
    listing = launch.compiled.listing
    (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
    loads = [i for i, name in enumerate(listing) if name.startswith("LDG.E.128")]
    assert trigger > wait if norm else trigger < min(loads)
    assert len(loads) == plain.compiled.count("LDG.E.128")
    if launch.arguments["PASSES"] == 1:
        assert max(loads) < wait  # the weight and the norm's parameters; not one of them in the loop
    else:
        assert sum(load < wait for load in loads) == 2 * launch.arguments["PIECES"]
        assert launch.compiled.registers <= 128  # room for two programs
    copies = [i for i, name in enumerate(listing) if name.startswith("LDGSTS")]
    assert min(copies) > wait  # x
    # Nothing between them waits for the weight, as copies of its registers would.
    assert sum(name.startswith(("MOV", "IMAD.MOV")) for name in listing[wait : min(copies)]) <= 4


@pytest.mark.parametrize(("N", "K"), [(768, 768), (768, 3072), (1024, 4096), (1600, 6400), (50304, 768)])
def test_products_without_a_norm_leave_half_a_multiprocessor_to_the_next_kernel(N, K):
    with dependent_launches():
        (launch,) = record(lambda: few(1, N, K, norm=False), capability=90)
    assert launch.compiled.registers * 32 * launch.compiled.num_warps <= 65536 // 2
