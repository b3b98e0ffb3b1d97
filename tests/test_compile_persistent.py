"""What the persistent step compiles to: a binary that fits a multiprocessor, with its weights before the barriers."""

import pytest
import torch

from bench.cost_card import step
from gpukernels.compile_report import CHIPS, cost, record, rows
from gpukernels.persistent import decode_schedule
from model import PRESETS
from model.gpt2 import slots
from model.parameters import Parameters
from model.persistent import why_not_persistent
from model.workloads import META, WORKLOADS


@pytest.fixture(scope="module")
def launch():
    (launch,) = record(WORKLOADS["gpt2/persistent"], capability=90)
    return launch


def test_it_is_one_launch_of_one_program_for_each_multiprocessor(launch):
    (row,) = rows([launch], 90)
    assert row.grid == (CHIPS[90].multiprocessors, 1, 1)
    assert row.problems == ()
    assert row.spilled_bytes <= 16
    assert row.resident_blocks >= 1
    assert row.shared_memory <= row.shared_memory_limit
    assert launch.cooperative


def stages(listing):
    """The instructions of each stage: before its barrier, and behind it.

    A program arrives by a reduction in memory, and polls with loads, both of the 64-bit counter.
    """
    arrivals = [i for i, name in enumerate(listing) if name.startswith("RED") and "ADD.64" in name]
    polls = [i for i, name in enumerate(listing) if name == "LDG.E.64.STRONG.GPU"][1:]  # first, what it showed before
    assert len(polls) == len(arrivals) + 1
    starts, ends = [0, *arrivals], [*arrivals, len(listing)]
    return [(listing[start:poll], listing[poll:end]) for start, poll, end in zip(starts, polls, ends, strict=True)]


def test_weights_and_old_keys_are_loaded_before_a_program_waits(launch):
    found = stages(launch.compiled.listing)
    kinds = [stage.name for stage in decode_schedule(1, dict.fromkeys(TILES, 1))]
    assert len(found) == len(kinds)  # the loop over layers has each of theirs once
    early = [sum(name.startswith("LDG.E.128") for name in before) for before, _ in found]
    # 8 warps, 768 columns: 16 rows of a weight are 6 loads of 16 bytes for a thread, and a norm's parameters 6 more;
    # 8 rows of 768 are 3, and of 3072 12; 64 keys and values of 64 are 4.
    assert dict(zip(kinds, early, strict=True)) == {
        "QKV 0": 12, "attention 0": 4, "projection 0": 3, "up 0": 12, "down 0": 12, "norm": 0, "head": 6, "sample": 0,
    }  # fmt: skip


TILES = ("QKV", "attention", "projection", "up", "down", "norm", "head", "sample")


def test_every_barrier_is_a_release_and_an_acquire_of_the_whole_gpu(launch):
    for before, behind in stages(launch.compiled.listing):
        # The first-level cache is emptied behind a poll that has seen the others' stores announced.
        assert behind[:2] == ["LDG.E.64.STRONG.GPU", "CCTL.IVALL"]
        if before[0].startswith("RED"):
            assert not any(name.startswith("STG") for name in before)
    listing = launch.compiled.listing
    arrivals = [i for i, name in enumerate(listing) if name.startswith("RED") and "ADD.64" in name]
    for place in arrivals:
        last = [name for name in listing[:place] if name.startswith(("STG", "MEMBAR"))][-1]
        assert last.startswith("MEMBAR.ALL.GPU"), "stores are visible before they are announced"


def test_its_cost_is_that_of_the_step(launch):
    config = PRESETS["gpt2"]
    least = step(config, "float16", batch=1, context=config.n_positions).moved
    assert least <= cost(launch).moved <= 1.01 * least


def test_float32_has_none():
    assert record(lambda: WORKLOADS["gpt2/persistent"]("float32"), capability=90) == []
    parameters = Parameters(slots(PRESETS["gpt2"]), META, "float32")
    assert "tensor cores do not multiply" in why_not_persistent(parameters, PRESETS["gpt2"])


def test_products_are_made_by_tensor_cores(launch):
    # Pieces of K for a warp: 3 for C and 12 for 4 C, two instructions each for 8 columns, of which a program has 16, or
    # 8 behind attention and up; QKV, projection, up, down, head.
    assert launch.compiled.tensor_core_instructions == 2 * (2 * 3 + 3 + 2 * 3 + 12 + 2 * 3)
    assert launch.arguments["x_ptr"].dtype == torch.float16
