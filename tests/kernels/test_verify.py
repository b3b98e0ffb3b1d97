"""`gpukernels verify`: what it says of kernels that are right, and of one that was broken on purpose."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, EMULATE

import gpukernels
from gpukernels.library import norm
from gpukernels.verify import OPS, dtypes_of, gather, verify
from gpukernels.verify.allocations import guarded
from gpukernels.verify.cases import Draw
from gpukernels.verify.compare import Compared
from gpukernels.verify.run import _cases
from model.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: its exit code, and what it prints."""
    if EMULATE:
        pytest.skip("it asks for a GPU, or for the interpreter")

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpukernels", "verify", "--quick", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().out

    return go


# Attention takes half of a whole run's time; the rest of it is held by the kernels' own tests.
OWN = [op for op in OPS if op not in ("attention", "linear", "embedding")]


@pytest.mark.parametrize("op", OWN)
def test_every_bound_holds(op):
    verdicts = [
        verdict
        for dtype in dtypes_of(torch.device(DEVICE))
        for verdict in verify(op, dtype, torch.device(DEVICE), quick=True)
    ]
    assert verdicts
    assert all(verdict.holds and verdict.cases >= 5 for verdict in verdicts), verdicts
    # What is compared is not the truth with itself: rounding leaves an error, but in tokens.
    assert any(verdict.worst > 1e-4 for verdict in verdicts) or op == "sample"


def test_a_broken_kernel_is_a_row_and_exit_code_1(run, monkeypatch):
    right = norm.norm_forward

    def off_in_the_last_column(x, *arguments, **options):
        y, *statistics = right(x, *arguments, **options)
        if y.shape[-1] == 129:
            y[..., 128] += 2.0**-6
        return y, *statistics

    monkeypatch.setattr(norm, "norm_forward", off_in_the_last_column)
    code, out = run("--op", "layer_norm", "--dtype", "float32")
    assert code == 1
    assert "1 of 2 rows are beyond the bound" in out
    (line,) = [line for line in out.splitlines() if line.startswith("  layer_norm float32 forward: ")]
    assert "x (5, 129)" in line
    assert "128]" in line
    code, out = run("--op", "layer_norm", "--dtype", "float32", "--json")
    document = json.loads(out)
    assert code == 1
    assert not document["holds"]
    forward, backward = document["verdicts"]
    assert forward["worst"] > 100
    assert forward["at"][-1] == 128
    assert not forward["holds"]
    assert backward["holds"]


def test_a_kernel_that_fails_is_a_row_too(run, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no such launch")

    monkeypatch.setattr(norm, "norm_forward", fails)
    code, out = run("--op", "rms_norm", "--dtype", "float16", "--json")
    assert code == 1
    verdicts = json.loads(out)["verdicts"]
    assert [verdict["error"] for verdict in verdicts] == ["RuntimeError: no such launch"] * 2
    assert verdicts[0]["worst"] is None


@pytest.mark.parametrize(("side", "at"), [("in front of", -1), ("behind", slice(5 * 129, 5 * 129 + 1))])
def test_what_is_written_beside_an_output_is_a_row(run, monkeypatch, side, at):
    right = norm.norm_forward

    def beside(x, *arguments, **options):
        y, *rest = right(x, *arguments, **options)
        if y.shape == (5, 129):
            start = y.storage_offset()
            whole = torch.as_strided(y, (y.untyped_storage().size() // y.element_size(),), (1,), 0)
            whole[start + at if at == -1 else slice(start + at.start, start + at.stop)] = 1
        return y, *rest

    monkeypatch.setattr(norm, "norm_forward", beside)
    code, out = run("--op", "layer_norm", "--dtype", "float32")
    assert code == 1
    assert f"layer_norm float32 forward: inf at x (5, 129): AssertionError: a kernel wrote {side} its output" in out


def test_what_is_not_written_is_not_a_number():
    with guarded():
        assert torch.empty(3, device=DEVICE).isnan().all()


def test_every_op_is_verified():
    assert set(OPS) == set(gpukernels.__all__) - {"ACTIVATIONS", "uniform"}


class Fatal(str):
    """The name of an op that ends the process which is told it, as a kernel may."""

    def __reduce__(self):
        return os._exit, (7,)


def test_an_op_whose_process_ends_is_a_row():
    found = dict(gather(["swiglu", Fatal("gelu")], ["float32"], torch.device(DEVICE), quick=True, processes=2))
    assert all(verdict.holds for verdict in found["swiglu"])
    assert [verdict.error for verdict in found["gelu"]] == ["its process ended with code 7"]
    assert not any(verdict.holds for verdict in found["gelu"])


def test_errors_are_in_units_of_the_bound():
    def errors(found, value, limit=0.5, dtype="float32"):
        return Compared("y", torch.tensor(found), np.array(value), np.array(limit), dtype).errors().tolist()

    inf, nan = float("inf"), float("nan")
    assert errors([1.0, 2.0, 4.0], [1.0, 2.5, 3.0]) == [0, 1, 2]
    assert errors([nan, nan, 1.0, inf], [nan, 1.0, nan, 1.0]) == [0, inf, inf, inf]
    assert errors([inf, -inf], [3.5e38, -1e39]) == [0, 0]
    assert errors([inf], [-1e39]) == [inf]
    assert errors([1.0], [1.0, 1.0]) == [inf]  # of another shape
    assert errors([1.0], [1.0], dtype="float16") == [inf]


def test_hard_values_are_there():
    every = list(_cases(OPS["rms_norm"], Draw("float16", torch.device("cpu"), quick=True)))
    by_values = {case.name.rpartition(", ")[2]: case.arrays["x"] for case in every}
    tiny = by_values["tiny values"].flatten()
    assert ((tiny != 0) & (tiny.abs() < 2.0**-14)).any()
    assert torch.signbit(tiny[tiny == 0]).any()
    assert by_values["huge values"].abs().max() > 100
    assert by_values["sliced"].stride(-1) == 1 < by_values["sliced"].stride(0) / by_values["sliced"].shape[-1]
    assert by_values["offset"].storage_offset() == 1
    assert by_values["transposed"].stride(0) == 1
    assert any(case.arrays["x"].numel() == 0 for case in every)
