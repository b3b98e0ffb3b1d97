"""`bench.kernels` without a GPU: the gate, what is counted, and a whole run on a device that stands in for one."""

import json
import time

import pytest
import torch
from plots import PLOT
from typer.testing import CliRunner

import bench.kernels
from bench import gate, kernel_cases, kernel_page, kernel_rows, kernel_tables, rivals, targets
from bench.gpu_timing import copies, repeats
from bench.kernel_cases import CASES
from bench.predicted import predict, recorded

SMALL = [
    kernel_cases.attention("GPT-2", 2, 40),
    kernel_cases.decode_attention("GPT-2", 2, 30),
    kernel_cases.norm("layer_norm", "GPT-2", 9),
    kernel_cases.norm("rms_norm", "GPT-2", 9),
    kernel_cases.product("linear", "GPT-2", 24, 48, 64),
    kernel_cases.product("linear_gelu", "GPT-2", 24, 48, 64),
    kernel_cases.product("few_rows", "GPT-2", 3, 48, 64),
    kernel_cases.product("norm_linear", "GPT-2", 3, 48, 64),
    kernel_cases.product("rms_norm_linear", "TinyLlama", 3, 48, 64),
    kernel_cases.rope(1, 8),
    kernel_cases.swiglu(2),
    kernel_cases.gelu(3),
    kernel_cases.embedding(7, 50),
    kernel_cases.cross_entropy(6, 300),
    kernel_cases.linear_cross_entropy(6, 300),
    kernel_cases.adamw("GPT-2", 3000),
    kernel_cases.sample(3, 500),
]


class Here:
    """The CPU in the place of a GPU: no graph, and a clock that is the host's."""

    name, kind, l2, free = "stand-in", "cpu", 1000, 1 << 30

    def captured(self, calls, times):
        return self.launched(calls, times)

    def launched(self, calls, times):
        def clock():
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return clock

    def peak(self, call):
        start = time.perf_counter()
        call()
        return 1000, time.perf_counter() - start

    def release(self):
        pass

    def alive(self):
        return True


def test_every_op_has_a_small_case_here():
    assert {case.op for case in SMALL} == {case.op for case in CASES} == set(rivals.OPS)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_right_answers_pass_the_gate(case):
    truth = gate.true(case, "cpu")
    for provider in rivals.providers(case.op, compiled=False):
        verdicts = gate.judge(case, provider, truth, "cpu")
        assert set(verdicts) >= set(case.directions)
        assert all(verdict.right for verdict in verdicts.values()), (provider.name, verdicts)


def _last_row(change):
    """Our op, with the last row of its result changed."""

    def run(**inputs):
        y = rivals.OPS["layer_norm"].ours(**inputs)
        return torch.cat([y[:-1], change(y[-1:])])

    return run


WRONG = {
    "attention": lambda q, k, v: rivals.OPS["attention"].ours(q, k, v, causal=False),
    "linear_gelu": lambda x, weight, bias: rivals.OPS["linear_gelu"].ours(x, weight),
    "norm_linear": lambda x, norm_weight, norm_bias, weight, bias: rivals.OPS["few_rows"].ours(x, weight, bias),
    "rms_norm_linear": lambda x, norm_weight, weight: rivals.OPS["norm_linear"].ours(x, norm_weight, None, weight),
    "layer_norm": _last_row(lambda row: row * 1.05),
    "rms_norm": lambda x, weight: torch.full_like(x, torch.nan) * x * weight,
    "sample": lambda logits, **options: rivals.OPS["sample"].ours(logits),
    "adamw": lambda parameter, gradient, first_moment, second_moment, **scalars: (
        parameter, first_moment, second_moment,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", WRONG)
def test_wrong_answers_do_not_pass_the_gate(op):
    case = next(case for case in SMALL if case.op == op)
    if case.leaves and op == "linear_gelu":
        case = case._replace(leaves=("x", "weight"))  # autograd has no gradient of a bias that is not used
    verdicts = gate.judge(case, rivals.Provider("wrong", WRONG[op]), gate.true(case, "cpu"), "cpu")
    assert not verdicts["forward"].right


def test_a_wrong_gradient_does_not_pass_the_gate():
    case = next(case for case in SMALL if case.op == "gelu")

    def straight_through(x):
        return x + (rivals.OPS["gelu"].ours(x) - x).detach()

    verdicts = gate.judge(case, rivals.Provider("wrong", straight_through), gate.true(case, "cpu"), "cpu")
    assert verdicts["forward"].right
    assert not verdicts["backward"].right
    assert not verdicts["both"].right


def test_what_is_timed_without_a_gradient_is_judged_without_one():
    case = next(case for case in SMALL if case.op == "gelu")

    def sometimes(x):
        return rivals.OPS["gelu"].ours(x) * (1 if torch.is_grad_enabled() else 2)

    verdicts = gate.judge(case, rivals.Provider("wrong", sometimes), gate.true(case, "cpu"), "cpu")
    assert not verdicts["forward"].right
    assert verdicts["backward"].right
    assert verdicts["both"].right


def test_inputs_are_judged_where_they_lie():
    """Side by side in one array, as the projection leaves them."""
    case = next(case for case in SMALL if case.op == "attention")
    seen = []

    def remembering(q, k, v):
        seen.append(q.stride())
        return rivals.OPS["attention"].ours(q, k, v)

    gate.judge(case, rivals.Provider("ours", remembering), gate.true(case, "cpu"), "cpu")
    assert seen == [(40 * 3 * 768, 3 * 768, 64, 1)] * 2


def test_bytes_and_operations_by_hand():
    norm = kernel_cases.norm("layer_norm", "GPT-2", 1000)
    assert kernel_rows.work(norm, "forward") == (2 * (2 * 1000 * 768 + 2 * 768), 0, False)
    assert kernel_rows.work(norm, "backward") == (2 * (3 * 1000 * 768 + 4 * 768), 0, False)
    loss = kernel_cases.cross_entropy(10, 500)
    assert kernel_rows.work(loss, "both").moved == 2 * 2 * 10 * 500 + 10 * 8 + 4  # the logits are read once
    product = kernel_cases.product("linear", "GPT-2", 8192, 2304, 768)
    assert kernel_rows.work(product, "both").flops == 3 * 2 * 8192 * 2304 * 768
    embedding = kernel_cases.embedding(10, 500)
    assert kernel_rows.work(embedding, "forward").moved == 10 * 8 + 2 * 2 * 10 * 768
    attention = kernel_cases.attention("GPT-2", 8, 1024)
    assert kernel_rows.work(attention, "forward").flops == 4 * 8 * 12 * 64 * 1024**2 // 2
    assert kernel_rows.work(attention, "backward").flops == 10 * 8 * 12 * 64 * 1024**2 // 2


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.op)
def test_no_case_counts_more_than_our_launches_move(case):
    rows = predict(case)
    assert [row["direction"] for row in rows] == list(case.directions)
    for row in rows:
        work = kernel_rows.work(case, row["direction"])
        assert work.moved <= row["bytes"] * 1.0001  # but for a handful of scalars
        assert work.flops <= row["flops"]
        assert row["milliseconds"]["H200"] <= row["milliseconds"]["H100"] <= row["milliseconds"]["RTX 4090"]
        assert row["milliseconds"]["H100"] >= 1e3 * max(row["bytes"] / 3.35e12, row["flops"] / 989.4e12) * 0.9999


def test_the_launches_of_a_direction():
    case = kernel_cases.norm("layer_norm", "GPT-2", 8192)
    names = {direction: [launch.kernel for launch in recorded(case, direction)] for direction in case.directions}
    assert names["forward"] == ["_norm_forward_kernel"]
    assert names["both"] == names["forward"] + names["backward"]
    assert names["backward"] == ["_norm_backward_kernel", "_add_partials_kernel"]
    few = next(case for case in CASES if case.op == "few_rows")
    assert recorded(few, "forward")[0].kernel == "_few_rows_kernel"
    loss = next(case for case in CASES if case.op == "cross_entropy")
    assert "_cross_entropy_backward_kernel" not in [launch.kernel for launch in recorded(loss, "both")]  # at once


def test_inputs_pass_three_times_the_cache():
    device = Here()
    assert copies(400, 500, device) == 8  # 3000 bytes
    assert copies(10_000, 10_000, device) == 1
    with pytest.raises(torch.OutOfMemoryError, match="8 sets of 100000000 bytes are more than half of 1073741824"):
        copies(400, 100_000_000, device)


def test_a_graph_takes_about_five_milliseconds():
    assert repeats(50e-6, calls=8) == 12
    assert repeats(1e-6, calls=8) == 50  # 400 calls at most
    assert repeats(1.0, calls=3) == 1


def test_a_run(tmp_path, capsys, monkeypatch):
    """The whole of it: a right rival, a wrong one, one that cannot run; table, file, targets and page."""

    def impossible(**inputs):
        raise RuntimeError("no kernel\nfor this")

    wrong = rivals.Provider("wrong", WRONG["layer_norm"], capturable=False)
    others = [wrong, rivals.Provider("impossible", impossible), rivals.Provider("host", rivals.OPS["layer_norm"].torch,
                                                                                capturable=False)]  # fmt: skip
    norm = rivals.OPS["layer_norm"]._replace(rivals=lambda: others)
    monkeypatch.setitem(rivals.OPS, "layer_norm", norm)
    cases = [case for case in SMALL if case.op in ("layer_norm", "few_rows", "cross_entropy")]
    written = []
    monkeypatch.setattr(bench.kernels, "write_json", lambda file, document: written.append(json.dumps(document)))
    document = bench.kernels.run(cases, Here(), tmp_path / "k.json", rounds=3, compiled=False, nbytes=10_000, side=32)
    assert [len(json.loads(each)["rows"]) for each in written] == [15, 17, 23]  # after every case, whole
    rows = {(row["op"], row["direction"], row["provider"]): row for row in document["rows"]}
    ours, torchs = rows["layer_norm", "backward", "ours"], rows["layer_norm", "backward", "torch"]
    assert ours["rate"] == pytest.approx(kernel_rows.work(cases[0], "backward").moved / ours["seconds"] / 1e12)
    assert ours["seconds_20_80"][0] <= ours["seconds"] <= ours["seconds_20_80"][1]
    assert torchs["speedup_of_ours"] > 0
    assert "speedup_of_ours" not in ours
    assert "wrong answer: result 0 is off by" in rows["layer_norm", "forward", "wrong"]["fault"]
    assert "seconds" not in rows["layer_norm", "forward", "wrong"]
    assert rows["layer_norm", "both", "impossible"]["fault"] == "no kernel for this"
    host = rows["layer_norm", "forward", "host"]
    assert not host["graph"]
    assert host["seconds"] == host["launched_seconds"]
    text = capsys.readouterr().out
    assert "layer_norm, float16" in text
    assert "off by" in text
    assert "not yet measured" in text
    html = kernel_page.measured(document).html
    assert html.count(PLOT) == 4  # a roofline, and three ops
    assert "no kernel for this" in html


ROOFS = kernel_rows.Roofs(3e12, 700e12)


def test_out_of_memory_is_a_row_and_not_an_end(monkeypatch):
    device = Here()
    monkeypatch.setattr(device, "free", 100, raising=False)
    case = next(case for case in SMALL if case.op == "few_rows")
    rows = kernel_rows.measure(case, rivals.providers(case.op, compiled=False), device, ROOFS, rounds=2)
    assert {row["fault"] for row in rows} == {"out of memory"}
    assert all("seconds" not in row for row in rows)


def _row(op, direction, provider, shape, seconds, **more):
    row = {"op": op, "direction": direction, "provider": provider, "model": "GPT-2", "shape": shape}
    return row | {"seconds": seconds, "rate": 0.1 / seconds, "peak_bytes": 100, **more}


def test_targets_are_told_from_the_rows():
    rows = [
        _row("attention", "forward", "ours", "B 8", 1.0),
        _row("attention", "forward", "SDPA cuDNN", "B 8", 1.2, speedup_of_ours=1.25),
        _row("attention", "forward", "ours", "B 4", 1.0),
        _row("attention", "forward", "SDPA cuDNN", "B 4", 1.0, speedup_of_ours=1.0),
        _row("layer_norm", "forward", "ours", "32768 x 768", 0.03),
        _row("linear_cross_entropy", "both", "ours", "8192 x 768 -> 50304", 1.0),
        _row("linear_cross_entropy", "both", "torch", "8192 x 768 -> 50304", 1.0, peak_bytes=500),
        _row("few_rows", "forward", "ours", "1 x 768 -> 2304", 1.0, fault="wrong answer"),
    ]
    found = {each["target"]: each for each in targets.compared(rows, "NVIDIA H100 80GB HBM3")}
    cudnn = found["attention forward, D 64, over cuDNN"]
    assert (cudnn["measured"], cudnn["met"]) == (1.0, False)  # the worst shape counts
    assert found["layer norm forward, 32768 x 768, TB/s"]["met"]
    memory = found["linear + cross entropy with gradients, memory over torch's"]
    assert (memory["measured"], memory["met"]) == (0.2, True)
    assert found["linear + cross entropy with gradients, time over torch's"]["met"]
    assert targets.cells(found["few-row product, over cuBLAS"])[2:] == ("no right answer", "no")
    assert targets.cells(found["AdamW, 124 M parameters, ms"])[2:] == ("not yet measured", "-")
    elsewhere = {each["target"]: each for each in targets.compared(rows, "NVIDIA A100")}
    assert elsewhere["layer norm forward, 32768 x 768, TB/s"]["met"] is None  # set for an H100


def test_a_dtype_that_is_not_in_the_title_stands_in_the_row():
    cases = [each for each in SMALL if each.op == "gelu"] * 2
    rows = [row for case, dtype in zip(cases, (torch.float16, torch.bfloat16), strict=True)
            for row in predict(case._replace(dtype=dtype))]  # fmt: skip
    (table,) = kernel_tables.predicted(rows)
    assert table.title == "gelu, float16"
    shapes = [row[0] for row in table.rows]
    assert shapes == ["GPT-2, 3 x 3072", "", "", "GPT-2, 3 x 3072, bfloat16", "", ""]


def test_digits():
    assert [kernel_tables.digits(x) for x in (0, 0.00483, 1.0, 12.345, 99.96, 123.4, 1e-5)] == [
        "0", "0.00483", "1.00", "12.3", "100", "123", "1e-05",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--op", "softmax"], "the op must be one of attention, layer_norm, "),
        (["--html", "nowhere/r.html"], "nowhere/r.html: there is no folder "),
        (["--tune", "gelu", "--op", "gelu"], "--tune prints rows for one op; it goes with --quick and --rounds only"),
        (["--json", "/"], "/: no file can be written there"),
        (["--resume"], "--resume goes with --json"),
        (["--tune", "layer_norm"], "--tune times tiles on a GPU, and there is no CUDA GPU here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_mistakes_are_one_line(arguments, problem):
    import typer

    app = typer.Typer()
    app.command()(bench.kernels.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {problem}")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_roofs_are_printed(tmp_path, capsys):
    bench.kernels.main(op=["layer_norm"], quick=True, json_file=tmp_path / "k.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No CUDA GPU here: nothing is measured.")
    document = json.loads(lines[-1])
    assert document == json.loads((tmp_path / "k.json").read_text())
    assert document["predicted"]
    assert not any("seconds" in row for row in document["rows"])
    forward = document["rows"][0]
    assert forward["bytes"] == 2 * (2 * 32768 * 768 + 2 * 768) + 4 * 2 * 32768
    assert forward["milliseconds"]["H100"] == pytest.approx(forward["bytes"] / 3.35e12 * 1e3)
