"""Checkpoints that cannot be gone on with, and what is none: one sentence each, and nothing is overwritten."""

import json
import math

import finetuning
import numpy as np
import pytest
from finetuning import CONTEXT, QUIET, VOCABULARY, load
from safetensors.torch import load_file, save_file

from model.errors import ModelError
from model.finetune import checkpoint

OPTIONS = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-3, "validation": 0.2, "context": CONTEXT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCABULARY, (12, CONTEXT))


@pytest.fixture
def stopped(folder, ids, tmp_path):
    """A run that was stopped behind its first step."""
    run(folder, ids, tmp_path / "out", max_time=1e-9)
    return tmp_path / "out"


def run(folder, ids, out, **options):
    return load(folder).finetune(ids, out=out, console=QUIET, **{**OPTIONS, **options})


def refused(call) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    return str(caught.value)


DAMAGED = [
    ("progress", None, "progress must be an object, got null"),
    ("loss_scale", [1], "loss_scale must be an object, got [1]"),
    ("progress", {"step": "1"}, 'step of progress cannot be "1"'),
    ("progress", {"tokens": -1}, "tokens of progress cannot be -1"),
    ("progress", {"tokens": 2**63}, "tokens of progress cannot be 9223372036854775808"),
    ("progress", {"skipped": None}, "skipped of progress cannot be null"),
    ("progress", {"seconds": math.inf}, "seconds of progress cannot be Infinity"),
    ("progress", {"best_loss": math.nan}, "best_loss of progress cannot be NaN"),
    ("progress", {"steps": 1}, "progress has no steps"),
    ("progress", {"step": 5}, "says that it is of step 5 with 0 skipped"),
    ("progress", {"skipped": 2}, "says that it is of step 1 with 2 skipped"),
    ("loss_scale", {"dynamic": 1}, "dynamic of loss_scale cannot be 1"),
    ("loss_scale", {"value": True}, "value of loss_scale cannot be true"),
    ("loss_scale", {"value": 0}, "has the loss scale 0, which must be above 0"),
]


@pytest.mark.parametrize(("group", "change", "said"), DAMAGED, ids=[each[2] for each in DAMAGED])
def test_numbers_of_a_checkpoint_that_cannot_be_are_one_sentence(folder, ids, stopped, group, change, said):
    path = checkpoint.newest(stopped) / "training.json"
    document = json.loads(path.read_text())
    document[group] = document[group] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(document))
    (line,) = refused(lambda: run(folder, ids, stopped, resume=True)).splitlines()
    assert line.startswith(str(path.parent))
    assert said in line


def test_a_checkpoint_without_its_best_weights_is_one_sentence(folder, ids, stopped):
    path = checkpoint.newest(stopped) / "training.safetensors"
    save_file({name: each for name, each in load_file(path).items() if not name.startswith("best/")}, path)
    (line,) = refused(lambda: run(folder, ids, stopped, resume=True)).splitlines()
    assert line.startswith(f"{path}: best/")
    assert line.endswith("and is missing")


def test_a_folder_that_holds_no_run_is_not_written_to(folder, ids, tmp_path):
    """What a user gave by mistake for the run's: its config.json would be another model's then."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert refused(lambda: run(folder, ids, out, resume=True)) == (
        f"{out}: there is no run to resume: it has neither a checkpoint nor log.jsonl"
    )
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("config.json", "mine")]


def test_a_run_that_was_stopped_behind_its_last_step_has_that_steps_loss(folder, ids, tmp_path):
    out, options = tmp_path / "out", {"max_steps": 2}
    wanted = run(folder, ids, None, **options)
    for _ in range(2):
        result = run(folder, ids, out, max_time=1e-9, resume=out.exists(), **options)
        assert (result.reason, math.isnan(result.loss)) == ("max_time", False)
    result = run(folder, ids, out, resume=True, **options)
    assert (result.reason, result.steps) == ("finished", 2)
    assert result.loss == wanted.loss


def test_a_run_does_not_go_on_with_the_model_that_it_has_trained(folder, ids, tmp_path):
    """What is left of it is in the checkpoint; how to go on is said."""
    lm, options = load(folder), {**OPTIONS, "validation": 0, "out": tmp_path / "out", "console": QUIET}
    lm.finetune(ids, max_time=1e-9, **options)
    said = refused(lambda: lm.finetune(ids, resume=True, **options))
    assert said.count("the run was started with") == 1
    assert said.endswith("; a run changes them: to go on, load anew the model that it began with")


def test_a_model_of_another_kind_is_one_line(ids, stopped, tmp_path):
    other = finetuning.folder_of(tmp_path / "other", "llama")
    said = refused(lambda: run(other, ids, stopped, resume=True))
    assert said == f"{stopped}: the run was started with model: model_type 'gpt2', not 'llama'"


class Killed(BaseException):
    """As little as a kill leaves to do."""


def test_a_kill_at_the_very_end_leaves_nothing_behind_once_the_run_is_resumed(folder, ids, tmp_path, monkeypatch):
    """While the plot is drawn, the run goes on; while its last checkpoint is removed, it is said to have finished."""
    out, whole, remove = tmp_path / "out", tmp_path / "whole", checkpoint.shutil.rmtree

    def draw(records, path):
        path.touch()

    def dies(*_):
        raise Killed

    def dies_at_the_end(path, **options):
        if (out / "loss.png").exists() and path.exists():
            raise Killed
        remove(path, **options)

    monkeypatch.setattr("model.finetune.log.installed", lambda package: True)
    monkeypatch.setattr("model.finetune.log.plot", draw)
    run(folder, ids, whole)
    for name, end in (("log.plot", dies), ("checkpoint.shutil.rmtree", dies_at_the_end)):
        with monkeypatch.context() as patched:
            patched.setattr(f"model.finetune.{name}", end)
            with pytest.raises(Killed):
                run(folder, ids, out, resume=out.exists())
        (out / ".loss.png.123.tmp").touch()
    assert "it has finished" in refused(lambda: run(folder, ids, out, resume=True))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
