"""A decode step as it is launched: how many kernels, which ones, and what they compile to."""

import pytest

from gpukernels.compile_report import record, rows
from model import PRESETS
from model.workloads import gpt2_decode


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_five_launches_a_layer_and_three_beside(preset, rows):
    launches = record(lambda: gpt2_decode(PRESETS[preset], rows, "float16", names=()), capability=90)
    layers = PRESETS[preset].n_layer
    names = [launch.kernel for launch in launches]
    few, attention = "_few_rows_kernel", "_decode_head_kernel"
    # Down's 12,800 bytes of K in GPT-2 XL are more than the registers of one program hold: two share them.
    finish = ["_few_rows_finish_kernel"] * (preset == "gpt2-xl")
    block = [few, attention, few, few, few, *finish]
    assert names == block * layers + ["_norm_forward_kernel", few, "_sample_kernel"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("preset", "dtype"), [("gpt2", "float32"), ("gpt2-xl", "float16")])
def test_kernels_of_a_step_keep_their_budgets(preset, dtype, capability):
    found = rows(record(lambda: gpt2_decode(PRESETS[preset], 8, dtype), capability=capability), capability)
    problems = {(row.kernel, row.constants): row.problems for row in found if row.problems}
    assert not problems


@pytest.mark.parametrize("capability", [90, 100])
def test_old_keys_and_values_are_loaded_before_the_wait(capability):
    launches = record(lambda: gpt2_decode(PRESETS["gpt2"], 1, "float16", names=()), capability=capability)
    launch = next(each for each in launches if each.kernel == "_decode_head_kernel")
    listing = launch.compiled.listing
    (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
    early = [i for i, name in enumerate(listing[:wait]) if name.startswith("LDG.E.128")]
    assert len(early) == 8  # 64 keys and as many values of 128 bytes, 16 of them for each of 128 threads
    assert wait < trigger
