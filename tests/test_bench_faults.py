"""`bench.kernels` where something fails: one provider, one case, the device; the others' figures stay."""

import json

import pytest
import torch
from test_bench_kernels import ROOFS, SMALL, Here

import bench.kernels
from bench import gate, kernel_page, kernel_rows, kernel_tables, report, rivals
from bench.predicted import predict


def test_one_that_fails_while_it_is_timed_has_a_fault_and_the_others_their_times():
    case, turns = next(case for case in SMALL if case.op == "few_rows"), []

    def later(x, weight, bias):
        turns.append(1)
        if len(turns) > 6:
            raise RuntimeError("an illegal memory access was encountered")
        return rivals.OPS["few_rows"].torch(x, weight, bias)

    def cannot_be_made(**inputs):
        raise ImportError("no module of that name")

    every = [*rivals.providers("few_rows", compiled=False)]
    every += [rivals.Provider("later", later), rivals.Provider("rival", cannot_be_made)]
    rows = {row["provider"]: row for row in kernel_rows.measure(case, every, Here(), ROOFS, rounds=5)}
    assert rows["later"]["fault"] == "an illegal memory access was encountered"
    assert not [key for key in rows["later"] if "seconds" in key or "speedup" in key]
    assert rows["rival"]["fault"] == "no module of that name"
    assert rows["ours"]["seconds"] > 0
    assert rows["torch"]["speedup_of_ours"] > 0
    text = kernel_tables.measured(list(rows.values()))[0]
    assert [row[2] for row in text.rows] == ["ours", "torch", "later", "rival"]


def test_what_has_made_its_gradients_before_has_no_backward_pass_of_its_own():
    case = next(case for case in SMALL if case.op == "cross_entropy")
    joint = rivals.Provider("Liger", rivals.OPS["cross_entropy"].torch, joint=True)
    rows = {row["direction"]: row for row in kernel_rows.measure(case, [joint], Here(), ROOFS, rounds=2)}
    assert rows["backward"]["fault"] == "its gradients are made in its forward pass: see both"
    assert "fault" not in rows["forward"] | rows["both"]


def test_a_truth_that_cannot_be_made_is_a_fault_too(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("cusolver is not there")

    monkeypatch.setattr(gate, "true", fails)
    case = next(case for case in SMALL if case.op == "gelu")
    rows = kernel_rows.measure(case, rivals.providers("gelu", compiled=False), Here(), ROOFS, rounds=2)
    assert {row["fault"] for row in rows} == {"no truth to compare with: cusolver is not there"}
    assert len(rows) == 6


def test_an_answer_that_is_no_number_leaves_a_file_that_any_reader_takes(tmp_path):
    case = next(case for case in SMALL if case.op == "rms_norm")
    wrong = rivals.Provider("wrong", lambda x, weight: x * weight * torch.nan)
    rows = kernel_rows.measure(case, [wrong], Here(), ROOFS, rounds=2)
    assert "is off by nan times" in rows[0]["fault"]
    report.write_json(tmp_path / "k.json", {"rows": rows, "other": [float("inf"), {"x": float("nan")}]})

    def refused(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "k.json").read_text(), parse_constant=refused)
    assert document["other"] == [None, {"x": None}]
    assert kernel_tables.measured(document["rows"])[0].rows[0][-3:] == ("", "", "")


def test_a_device_that_is_lost_ends_the_process_and_the_next_one_goes_on(tmp_path):
    """The case that did it keeps its rows, and is not tried again."""
    cases, file = [case for case in SMALL if case.op in ("rms_norm", "gelu", "swiglu")], tmp_path / "k.json"
    device, options = Here(), {"rounds": 2, "compiled": False, "nbytes": 10_000, "side": 32}
    device.alive = iter([True, False]).__next__
    with pytest.raises(bench.kernels.DeviceLost, match=cases[1].op):
        bench.kernels.run(cases, device, file, **options)
    earlier = bench.kernels._earlier(file)
    assert {row["op"] for row in earlier} == {cases[0].op, cases[1].op}
    document = bench.kernels.run(cases, Here(), file, earlier=earlier, **options)
    assert document["rows"][: len(earlier)] == earlier
    assert {row["op"] for row in document["rows"]} == {case.op for case in cases}
    with pytest.raises(ValueError, match=r"gone.json: no figures to go on from"):
        bench.kernels._earlier(tmp_path / "gone.json")


def test_a_page_without_matplotlib_has_its_tables(no_matplotlib):
    rows = [row for case in SMALL if case.op == "gelu" for row in predict(case)]
    html = kernel_page.predicted({"rows": rows, "machine": report.machine()}).html
    assert "<svg" not in html
    assert "No plot, as matplotlib is not installed" in html
    assert html.count("<table>") == 1
