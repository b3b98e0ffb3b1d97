"""Tiles that are tried: they reach the launches, and the best is the row to paste."""

import pytest
import torch
from test_bench_kernels import SMALL, Here

from bench import kernel_cases, rivals, tune
from bench.predicted import recorded
from bench.tune import KNOBS, Knob

SIZES = {
    "attention": kernel_cases.attention("GPT-2", 1, 256),
    "layer_norm": kernel_cases.norm("layer_norm", "GPT-2", 64),
    "linear": kernel_cases.product("linear", "GPT-2", 256, 768, 768),
    "few_rows": kernel_cases.product("few_rows", "GPT-2", 1, 768, 768),
    "cross_entropy": kernel_cases.cross_entropy(8, 50304),
    "gelu": kernel_cases.gelu(8),
    "rope": kernel_cases.rope(1, 8),
    "decode_attention": kernel_cases.decode_attention("GPT-2", 1, 1024),
    "embedding": kernel_cases.embedding(8),
    "linear_cross_entropy": kernel_cases.linear_cross_entropy(4096),
    "adamw": kernel_cases.adamw("GPT-2", 10_000),
    "sample": kernel_cases.sample(1),
}
ASKED = [(op, knob) for op in SIZES for knob in KNOBS[op] if knob.function != "pointer_tile"]  # an H100 is recorded


@pytest.mark.parametrize(("op", "knob"), ASKED, ids=lambda each: each if isinstance(each, str) else each.name)
def test_a_tile_that_is_tried_is_what_is_launched(op, knob):
    field = next(iter(knob.choices))
    seen = []
    with knob.trying({}, seen):
        before = recorded(SIZES[op], knob.direction)
    present = getattr(seen[0], field) if knob.function else seen[0][0]
    value = next(each for each in knob.choices[field] if each != present)
    with knob.trying({field: value}):
        launches = recorded(SIZES[op], knob.direction)
    if field == "_CHUNK_BYTES":
        assert len(launches) != len(before)
        return
    # A constant has another name in a launch.
    names = (field,) if knob.function else ("BLOCK", "BLOCK_N")
    assert value in {launch.arguments.get(name) for launch in launches for name in names}


def test_every_op_can_be_tuned():
    assert KNOBS.keys() == rivals.OPS.keys()


def test_every_candidate_is_of_fields_that_the_tile_has():
    for op, knob in ASKED:
        seen = []
        with knob.trying({}, seen):
            recorded(SIZES[op], knob.direction)
        assert not knob.function or set(knob.choices) <= set(seen[0]._fields)
        assert len(knob.candidates()) == len({tuple(each.items()) for each in knob.candidates()}) >= 3


def test_the_best_tile_is_the_row_to_paste(monkeypatch, capsys):
    """Three tiles of a knob: one is quick, one is wrong, one does not compile; the launcher is a stand-in."""
    from gpukernels.kernels import norm

    case = next(case for case in SMALL if case.op == "layer_norm")
    knob = Knob("norm", "norm_forward_tile", "forward", {"BLOCK_M": (8, 32, 64)}, repr)

    def launcher(x, weight, bias):
        rows = norm.norm_forward_tile(x.shape[-1], x.element_size()).BLOCK_M
        if rows == 64:
            raise RuntimeError("out of resource: shared memory")
        if rows == 4:  # what there is now
            torch.randn(1500, 1500) @ torch.randn(1500, 1500)
        y = rivals.OPS["layer_norm"].torch(x, weight, bias)
        return y * 2 if rows == 32 else y

    monkeypatch.setitem(rivals.OPS, "layer_norm", rivals.OPS["layer_norm"]._replace(ours=launcher))
    monkeypatch.setattr(kernel_cases, "CASES", (case._replace(quick=True),))
    monkeypatch.setitem(KNOBS, "layer_norm", [knob])
    tune.tune("layer_norm", Here(), quick=True, rounds=3)
    text = capsys.readouterr().out
    assert "    NormTile(BLOCK_M=8, BLOCK_N=256, num_warps=4, per_multiprocessor=0, whole=True)  # measured on" in text
    assert "wrong answer" in text
    assert "shared memory" in text


def test_an_op_without_tiles_is_refused():
    with pytest.raises(ValueError, match=r"the op to tune must be one of attention, .* got 'softmax'"):
        tune.tune("softmax", Here(), quick=True, rounds=1)
