"""The record of a run: lines of JSON that survive a kill, what is shown, trackers, the plot."""

import contextlib
import io
import json
import math
import sys
import types

import pytest
from plots import needs_matplotlib
from rich.console import Console

from model.config import PRESETS
from model.errors import CheckpointError, DataError, ModelError
from model.finetune import trackers
from model.finetune.flops import flops_per_token, peak_flops
from model.finetune.log import Log, read

QUIET = Console(quiet=True)


@pytest.fixture
def no_plots(monkeypatch):
    """Nothing is drawn, and no plot is missed."""
    monkeypatch.setattr("model.finetune.log.installed", lambda package: True)
    monkeypatch.setattr("model.finetune.log.plot", lambda records, path: None)


def train(log, steps, start=0):
    for step in range(start + 1, start + steps + 1):
        log.step({"step": step, "loss": 4.0 - step / 10, "rate": 1e-3, "tokens_per_second": 1000.0})


def test_every_record_is_a_line_that_is_there_at_once(tmp_path):
    folder = tmp_path / "run"
    with Log(folder, total=3, console=QUIET) as log:
        log.step({"step": 1, "loss": 3.5, "extra": "kept"})
        assert read(folder / "log.jsonl") == [{"kind": "step", "step": 1, "loss": 3.5, "extra": "kept"}]
        log.evaluation({"step": 1, "validation_loss": 2.0})
    assert read(folder / "log.jsonl")[1:] == [
        {"kind": "evaluation", "step": 1, "validation_loss": 2.0, "perplexity": math.exp(2.0)}
    ]
    with pytest.raises(ValueError, match="closed"):
        log.step({"step": 2})


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    with Log(tmp_path, total=2, console=QUIET) as log:
        log.step({"step": 1, "loss": math.nan, "gradient_norm": math.inf})
        log.evaluation({"step": 1, "validation_loss": math.nan})
        log.evaluation({"step": 2, "validation_loss": 800.0})
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second, third = read(tmp_path / "log.jsonl")
    assert (first["loss"], first["gradient_norm"], second["perplexity"]) == (None, None, None)
    assert (third["validation_loss"], third["perplexity"]) == (800.0, None)
    assert not (tmp_path / "loss.png").exists()  # nothing to draw


def test_a_resumed_run_goes_on_behind_its_checkpoint(tmp_path):
    with Log(tmp_path, total=9, console=QUIET) as log:
        train(log, 4)
        log.evaluation({"step": 4, "validation_loss": 3.0})
        train(log, 2, start=4)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # a kill
    with Log(tmp_path, total=9, done=4, console=QUIET) as log:
        train(log, 1, start=4)
    found = [(each["kind"], each["step"]) for each in read(tmp_path / "log.jsonl")]
    assert found == [("step", 1), ("step", 2), ("step", 3), ("step", 4), ("evaluation", 4), ("step", 5)]


def test_a_whole_log_is_gone_on_with_as_it_is_and_a_new_run_begins_anew(tmp_path):
    with Log(tmp_path, total=9, console=QUIET) as log:
        train(log, 3)
    before = (tmp_path / "log.jsonl").stat()
    with Log(tmp_path, total=9, done=3, console=QUIET):
        pass
    assert (tmp_path / "log.jsonl").stat().st_ino == before.st_ino
    with Log(tmp_path, total=9, console=QUIET) as log:
        train(log, 1)
    assert [each["step"] for each in read(tmp_path / "log.jsonl")] == [1]


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 1}\n[]\n')
    with pytest.raises(DataError, match="line 2 is not a record"):
        read(tmp_path / "log.jsonl")


@pytest.mark.parametrize("line", ['{"step": 1}', '{"kind": 5, "step": 1}', '{"kind": "step", "step": true}'])
def test_a_line_without_kind_or_step_is_no_record_and_does_not_stay(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"kind": "step", "step": 1}}\n{line}\n')
    with pytest.raises(DataError, match="line 2 is not a record"):
        read(tmp_path / "log.jsonl")
    with Log(tmp_path, total=9, done=1, console=QUIET):
        pass
    assert [each["step"] for each in read(tmp_path / "log.jsonl")] == [1]


@needs_matplotlib
def test_a_loss_that_is_no_number_is_not_drawn(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 1, "loss": "a"}\n')
    with Log(tmp_path, total=9, done=1, console=QUIET) as log:
        train(log, 2, start=1)
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_an_error_of_training_closes_the_log(tmp_path):
    page = io.StringIO()

    def fail():
        with Log(tmp_path, total=9, console=terminal(page)) as log:
            train(log, 2)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    assert page.getvalue().count("\x1b[?25l") == page.getvalue().count("\x1b[?25h") == 1  # the cursor is back


@needs_matplotlib
@pytest.mark.parametrize("fault", [None, RuntimeError("out of luck")], ids=str)
def test_a_run_that_ends_leaves_a_picture(tmp_path, fault):
    with contextlib.suppress(RuntimeError), Log(tmp_path, total=9, console=QUIET) as log:
        train(log, 2)
        if fault is not None:
            raise fault
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.jsonl", "loss.png"]


def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    def fill():
        with Log(tmp_path, total=9, console=QUIET) as log:
            train(log, 1)
            log._file.write('{"kind": "st')  # all that there is room for
            log._file.close()
            log._file = open("/dev/full", "w")  # noqa: SIM115
            train(log, 1, start=1)

    with pytest.raises(CheckpointError) as fault:
        fill()
    assert str(fault.value) == f"{tmp_path / 'log.jsonl'}: cannot be written: No space left on device"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/run/log\.jsonl: cannot be written: Not a directory"):
        Log(tmp_path / "file" / "run", total=1, console=QUIET)


def terminal(page):
    return Console(file=page, force_terminal=True, width=200, color_system=None)


def test_a_terminal_sees_figures_and_evaluations(tmp_path, no_plots):
    page = io.StringIO()
    options = {"flops_per_token": 2e9, "peak": 1e13}
    with Log(tmp_path, total=100, console=terminal(page), **options) as log:
        log.evaluation({"step": 0, "validation_loss": 2.0})
        log.step({"step": 1, "loss": 3.25, "rate": 3e-4, "gradient_norm": 1.5, "tokens_per_second": 1200.0,
                  "memory": 3 * 2**20, "skipped": 2})  # fmt: skip
    last = page.getvalue().splitlines()[-1]
    for part in ("step 1/100", "loss 3.2500", "validation 2.0000", "perplexity 7.39", "rate 3.00e-04", "gradient 1.5",
                 "1,200 tokens/s", "24.0% of peak", "2 skipped", "left"):  # fmt: skip
        assert part in last
    assert "step 0: validation loss 2.0000, perplexity 7.39" in page.getvalue()
    assert read(tmp_path / "log.jsonl")[1]["peak_share"] == pytest.approx(0.24)


def test_a_file_is_not_flooded(tmp_path, no_plots):
    page = io.StringIO()
    with Log(tmp_path, total=500, console=Console(file=page, width=80)) as log:
        train(log, 499)
        log.evaluation({"step": 499, "validation_loss": 2.0})
        train(log, 1, start=499)
    lines = page.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 1/500", "step 499: validation loss 2.0000", "step 500/500"]
    assert "of peak" not in page.getvalue()


def test_the_last_figures_are_shown_though_it_was_not_their_turn(tmp_path, no_plots):
    page = io.StringIO()
    with Log(tmp_path, total=500, console=Console(file=page, width=80)) as log:
        train(log, 7)
    assert [line.split(",")[0] for line in page.getvalue().splitlines()] == ["step 1/500", "step 7/500"]


def test_time_left_is_of_the_steps_of_this_process(tmp_path, monkeypatch):
    page, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("model.finetune.progress.time.monotonic", lambda: clock[0])
    with Log(tmp_path, total=110, done=50, console=Console(file=page, width=200)) as log:
        clock[0] = 60.0
        log.step({"step": 60, "loss": 1.0})
    assert "0:05:00 left" in page.getvalue()  # 10 steps took a minute, 50 are left


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=f"{name} is not installed: pip install {name}"):
        Log(tmp_path / "run", total=1, trackers=[name], console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["wandb", None, 5, [5], [None]], ids=str)
def test_what_is_no_list_of_trackers_is_refused(tmp_path, given):
    with pytest.raises(ModelError, match=r"tracker(s must be a list| must be a name, or an object with log and close)"):
        Log(tmp_path / "run", total=1, trackers=given, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_no_tracker_is_refused(tmp_path):
    with pytest.raises(ModelError, match="one of tensorboard, wandb, got 'mlflow'"):
        Log(tmp_path, total=1, trackers=["mlflow"], console=QUIET)


def run_with(tmp_path, tracker):
    with Log(tmp_path, total=2, trackers=[tracker], console=QUIET) as log:
        log.step({"step": 1, "loss": 3.5, "rate": 1e-3, "gradient_norm": math.nan})
        log.evaluation({"step": 1, "validation_loss": 2.0})


def test_tensorboard_is_told_every_number(tmp_path, monkeypatch, no_plots):
    said = []

    class Writer:
        def __init__(self, folder, purge_step):
            said.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def close(self):
            said.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(trackers, "find_spec", lambda package: package)
    run_with(tmp_path, "tensorboard")
    assert said == [
        (str(tmp_path / "tensorboard"), None),
        ("train/loss", 3.5, 1),
        ("train/rate", 1e-3, 1),
        ("validation/validation_loss", 2.0, 1),
        ("validation/perplexity", math.exp(2.0), 1),
        "closed",
    ]
    said.clear()
    trackers.make_trackers(["tensorboard"], tmp_path, done=7)
    assert said == [(str(tmp_path / "tensorboard"), 8)]


def test_wandb_is_told_every_number(tmp_path, monkeypatch, no_plots):
    said = []
    run = types.SimpleNamespace(log=said.append, finish=lambda: said.append("finished"))

    def init(*, name, dir):
        said.append((name, dir))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(trackers, "find_spec", lambda package: package)
    run_with(tmp_path, "wandb")
    assert said == [
        (tmp_path.name, str(tmp_path)),
        {"step": 1, "train/loss": 3.5, "train/rate": 1e-3},
        {"step": 1, "validation/validation_loss": 2.0, "validation/perplexity": math.exp(2.0)},
        "finished",
    ]


def test_an_object_of_ones_own_is_told_whole_records(tmp_path):
    said = []
    own = types.SimpleNamespace(log=said.append, close=lambda: said.append("closed"))
    run_with(tmp_path, own)
    assert said[0] == {"kind": "step", "step": 1, "loss": 3.5, "rate": 1e-3, "gradient_norm": None}
    assert said[-1] == "closed"


def test_flops_of_a_token_are_llm_cs_and_peaks_are_known_by_whole_names():
    # 6 * 124,439,808 + 6 * 12 * 768 * 1024
    assert flops_per_token(PRESETS["gpt2"], 1024) == 803_261_952
    # Of the two matrices of a vocabulary one is multiplied: 6 * (1,100,048,384 - 65,536,000) + 6 * 22 * 2048 * 1024
    assert flops_per_token(PRESETS["tinyllama-1.1b"], 1024) == 6_483_898_368
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == 66.9e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") is None


def test_a_tracker_that_fails_leaves_the_others_and_the_file_alone(tmp_path, no_plots):
    """Neither its end nor what it does to a record is another's, and it does not hide what ended the run."""

    def fails():
        raise RuntimeError("the network is away")

    said, closed = [], []
    bad = types.SimpleNamespace(log=dict.clear, close=fails)
    good = types.SimpleNamespace(log=said.append, close=lambda: closed.append(True))
    log = Log(tmp_path, total=2, trackers=[bad, good], console=QUIET)
    with pytest.raises(RuntimeError, match="the network is away"), log:
        train(log, 1)
    assert said[0]["step"] == 1
    assert closed == [True]
    assert log._file.closed
    with pytest.raises(KeyError) as caught, Log(None, total=2, trackers=[bad], console=QUIET):
        raise KeyError("of the run")
    assert caught.value.__notes__ == ["and closing the log: RuntimeError('the network is away')"]
