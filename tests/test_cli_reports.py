"""The commands that report: what kernels compile to, and what is verified; and a mistake's one line."""

import json
import sys

import pytest
from plots import PLOT

from model.cli import main
from model.workloads import WORKLOADS


@pytest.fixture
def run(monkeypatch, capsys):
    """A command in this process: its exit code, standard output, and standard error."""

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpukernels", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return go


STEP = ["compile-report", "--workload", "gpt2/decode-1", "--processes", "1"]


def test_a_report_is_a_table_of_120_columns(run, tmp_path):
    code, out, _ = run(*STEP, "--html", str(tmp_path / "report.html"))
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120
    rows = [line.split() for line in out.splitlines() if line.startswith("decode_head ")]
    assert len(rows) == 2  # its machine code, and what it costs
    assert rows[1][1] == "12"  # launches
    assert "Every budget is kept" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "decode_head" in page
    assert page.count("<table>") == 2
    assert page.count(PLOT) == 1


def test_nothing_is_left_out_of_a_narrow_table(run, monkeypatch):
    code, out, _ = run(*STEP)
    assert code == 0
    assert "…" not in out
    monkeypatch.setattr("rich.console.Console.width", 80)
    code, out, _ = run(*STEP)
    assert "…" not in out


def test_a_report_as_json_has_what_the_table_shows(run):
    code, out, _ = run(*STEP, "--json", "--gpu", "rtx 4090", "--kernel", "few_rows", "--dtype", "bfloat16")
    assert code == 0
    (part,) = json.loads(out)["workloads"]
    assert (part["workload"], part["capability"], part["what"]) == ("gpt2/decode-1", 89, "one token")
    kernels = part["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"_few_rows_kernel"}
    assert sum(kernel["launches"] for kernel in kernels) == 4 * 12 + 1
    for kernel in kernels:
        assert kernel["tensor_cores"].keys() == {"HMMA.16816"}
        assert kernel["loads"]["16"] > 0
        assert kernel["resident_warps"] >= 8
        assert kernel["roofline"].keys() == {"A100", "RTX 4090", "H100", "H200"}
        assert kernel["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "gpt5"], "--workload must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-7b, or"),
        (["--arch", "70"], "--arch must be 80, 89, 90, 100 or all, got 70"),
        (["--gpu", "V100"], "--gpu: the GPU must be one of A100, RTX 4090, H100, H200, got 'V100'"),
        (["--dtype", "int8"], "--dtype must be float32, float16, bfloat16, got int8"),
        (["--html", "no/such/report.html"], "--html: there is no folder no/such"),
        (["--html", "/"], "--html: / is a folder"),
        (["--kernel", "convolution"], "--kernel: no kernel has 'convolution' in its name"),
    ],
)
def test_mistakes_of_compile_report(run, arguments, words):
    code, out, err = run("compile-report", "--workload", "gpt2/decode-1", "--processes", "1", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_what_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("compile-report", "verify"):
        code, _, err = run(command)
        assert code == 2
        assert "torch" in err
        assert "pip install 'gpukernels[" in err


def test_every_model_has_the_same_steps():
    steps = {}
    for name in WORKLOADS:
        steps.setdefault(name.partition("/")[0], []).append(name.partition("/")[2])
    steps["gpt2"].remove("persistent")  # what has one is told by `why_not_persistent`
    assert set(map(tuple, steps.values())) == {("prefill", "decode-1", "decode-8", "decode-64", "training")}
    assert WORKLOADS["gpt2/decode-8"].what == "one token for each of 8 rows"


def test_verifying_numpy(run):
    code, out, _ = run("verify", "--quick", "--device", "cpu", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["holds"]
    assert document["device"] == "NumPy on the CPU"
    assert len(document["verdicts"]) == 2 * 19  # ops, in float16 and in float32
    assert all(verdict["way"] == "forward" and verdict["worst"] <= 1 for verdict in document["verdicts"])


def test_verifying_without_a_gpu_is_refused_in_one_line(run, monkeypatch):
    monkeypatch.setattr("model.cli.verify.why_no_cuda", lambda: "there is no NVIDIA driver on this machine")
    code, out, err = run("verify")
    assert (code, out) == (2, "")
    assert err.startswith("error: verify: there is no NVIDIA driver on this machine; TRITON_INTERPRET=1")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "conv"], "--op must be one of layer_norm, rms_norm"),
        (["--dtype", "int8"], "--dtype must be one of float16, bfloat16, float32, got int8"),
        (["--device", "cpu", "--dtype", "bfloat16"], "--dtype bfloat16: NumPy has no such type"),
        (["--device", "xpu"], "--device must be cuda, cuda:1 (or another number), cpu, or sm_90, got 'xpu'"),
        (["--device", "sm_70"], "--device: what can be emulated is sm_80, sm_89, sm_90, got 'sm_70'"),
        (["--device", "cuda:first"], "got 'cuda:first'"),
    ],
)
def test_mistakes_of_verify(run, arguments, words):
    code, out, err = run("verify", "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert words in err
