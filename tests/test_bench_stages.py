"""Stages of a decode step, told from a profiler's trace."""

import subprocess
import sys

import pytest
import torch

from bench.cost_card import step
from bench.stages import kernels, stage_bytes, stages
from model.gpt2_config import PRESETS

FEW, ATTENTION, NORM, SAMPLE = "_few_rows_kernel", "_decode_head_kernel", "_norm_forward_kernel", "_sample_kernel"
NAMES = [FEW, ATTENTION, FEW, FEW, FEW] * 2 + [NORM, FEW, SAMPLE]


def trace(steps, names=NAMES):
    """Kernel i of a step starts i + 1 microseconds behind the one before, and all are at work for 50."""
    events, now = [{"cat": "cpu_op", "name": "aten::copy_", "ts": 0, "dur": 1}], 0.0
    for number in range(steps):
        for place, name in enumerate(names):
            now += place + 1
            events.append({"cat": "kernel", "name": name, "ts": now, "dur": 50.0})
        now += 1000 + number
    return {"traceEvents": events[::-1]}


def test_a_stage_lasts_until_the_next_one_starts():
    rows = {row["stage"]: row for row in stages(kernels(trace(3)), 3, layers=2)}
    assert list(rows) == ["QKV", "attention", "projection", "up", "down", "last norm", "head", "sample"]
    # The time between the starts of kernels i and i + 1 is i + 2; the last one has its own 50.
    assert rows["QKV"]["step"] == pytest.approx(2 + 7)
    assert rows["down"]["step"] == pytest.approx(6 + 11)
    assert rows["down"]["each"] == pytest.approx((6 + 11) / 2)
    assert rows["head"]["step"] == pytest.approx(13)
    assert rows["sample"]["step"] == pytest.approx(50)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["attention"]["launches"] == 2


def test_other_launches_go_by_their_kernels():
    rows = stages(kernels(trace(2, [NORM, FEW, ATTENTION, FEW])), 2, layers=1)
    assert {row["stage"]: row["launches"] for row in rows} == {NORM: 1, FEW: 2, ATTENTION: 1}


@pytest.mark.parametrize("names", [[], [FEW, SAMPLE, FEW]])
def test_steps_that_differ_are_refused(names):
    with pytest.raises(ValueError, match="not so many equal ones"):
        stages(kernels(trace(1, names)), 2, layers=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_bytes_of_the_stages_are_those_of_the_step(preset):
    """But for biases and norm parameters."""
    parts = sum(stage_bytes(PRESETS[preset], "float16", batch=4, context=100).values())
    whole = step(PRESETS[preset], "float16", batch=4, context=100).moved
    assert 0.998 * whole < parts < whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "word"), [([], "GPU"), (["--preset", "x"], "gpt2-xl"), (["--context", "1000"], "context must be 924")]
)
def test_refusals_are_one_line(arguments, word):
    done = subprocess.run([sys.executable, "-m", "bench.stages", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert word in done.stderr
