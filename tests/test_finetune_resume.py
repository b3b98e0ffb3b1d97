"""Runs that are stopped, by an error, a signal, a kill or a full disk, and go on as if nothing had been."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import finetuning
import numpy as np
import pytest
import torch
from finetuning import CONTEXT, QUIET, VOCABULARY, load, records, weights
from reference import Judge

import model
from model.errors import ModelError
from model.finetune import checkpoint
from model.finetune.batches import Batches
from model.finetune.log import Log
from model.finetune.train import Trainer

OPTIONS = {
    "epochs": 2,
    "batch_size": 2,
    "accumulate": 2,
    "learning_rate": 1e-3,
    "dropout": 0.1,
    "evaluate_every": 6,
    "save_every": 4,
    "validation": 0.2,
    "context": CONTEXT,
    "seed": 5,
}
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(0, VOCABULARY, (50, CONTEXT)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """A picture takes as long as ten of these runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("model.finetune.log.plot", lambda records, path: None)
        yield


def run(folder, ids, out, **options):
    lm = load(folder)
    return lm, lm.finetune(ids, out=out, console=QUIET, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(folder, ids, tmp_path_factory):
    """The run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    _, result = run(folder, ids, out)
    assert (result.reason, result.steps) == ("finished", STEPS)
    assert result.best_step > 0
    assert not list(out.glob("checkpoint*"))
    return out


def same(out: Path, whole: Path) -> None:
    assert weights(out) == weights(whole)
    assert records(out) == records(whole)


class Killed(BaseException):
    """As little as a kill leaves to do."""


def killed_at(monkeypatch, moment: str, number: int) -> None:
    """The run ends without a word at its step of this number, or in its save of it: before, inside, or behind."""
    count = 0

    def dies(original, before: bool):
        def call(*args, **options):
            nonlocal count
            count += 1
            if before and count == number:
                raise Killed
            result = original(*args, **options)
            if count == number:
                raise Killed
            return result

        return call

    place, name = {
        "step": (Log, "step"),
        "evaluation": (Log, "evaluation"),
        "writing": (checkpoint, "write_tensors"),
        "renaming": (checkpoint.os, "rename"),
        "dropping": (checkpoint, "drop"),
    }[moment]
    monkeypatch.setattr(place, name, dies(getattr(place, name), moment in ("renaming", "dropping")))


_MOMENTS = [("step", 1), ("writing", 1), ("renaming", 2), ("dropping", 2), ("evaluation", 3)]
_DRAWN = random.Random(11)
_MOMENTS += [("step", _DRAWN.randint(2, STEPS)) for _ in range(10)]


@pytest.mark.parametrize(("moment", "number"), dict.fromkeys(_MOMENTS))
def test_a_run_that_is_killed_goes_on_to_the_same_bits(folder, ids, whole, tmp_path, monkeypatch, moment, number):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        killed_at(patched, moment, number)
        with pytest.raises(Killed):
            run(folder, ids, out)
    (out / ".model.safetensors.123.tmp").touch()  # what SIGKILL leaves of a file that was being written
    _, result = run(folder, ids, out, resume=True)
    assert result.steps == STEPS
    same(out, whole)
    assert not list(out.glob(".*"))


def test_a_run_may_be_stopped_at_step_after_step(folder, ids, whole, tmp_path):
    """max_time is no part of what a run must have in common with the one that it continues."""
    out = tmp_path / "out"
    _, result = run(folder, ids, out, max_time=1e-9)
    for step in range(2, 9):
        assert (result.reason, result.steps) == ("max_time", step - 1)
        _, result = run(folder, ids, out, max_time=1e-9, resume=True)
    run(folder, ids, out, resume=True)
    same(out, whole)


def test_the_same_seed_is_the_same_run(folder, ids, whole, tmp_path):
    run(folder, ids, tmp_path / "again")
    same(tmp_path / "again", whole)
    run(folder, ids, tmp_path / "another", seed=6)
    assert weights(tmp_path / "another") != weights(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(folder, ids, whole, tmp_path, monkeypatch, number):
    out, handlers = tmp_path / "out", [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    step = Log.step

    def told(self, record):
        step(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "step", told)
        lm, result = run(folder, ids, out)
    assert (result.reason, result.steps, result.signal) == ("interrupted", 7, number)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-7"]
    # What there is so far can be used.
    np.testing.assert_array_equal(load(out).logits(ids[0]), lm.logits(ids[0]))
    run(folder, ids, out, resume=True)
    same(out, whole)


@pytest.mark.parametrize(("last", "step"), [(3, 0), (8, 6), (23, STEPS)])  # an evaluation has five batches
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(folder, ids, whole, tmp_path, monkeypatch, last, step):
    out, seen, passes = tmp_path / "out", [], Batches.passes

    def told(self, *arguments):
        if not torch.is_grad_enabled():
            seen.append(arguments)
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGINT)
        return passes(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "passes", told)
        _, result = run(folder, ids, out)
    assert len(seen) == last
    assert (result.reason, result.steps, result.signal) == ("interrupted", step, signal.SIGINT)
    with monkeypatch.context() as patched:
        killed_at(patched, "step", 1)  # behind this evaluation, and before the next checkpoint
        with suppress(Killed):
            run(folder, ids, out, resume=True)
    if step < STEPS:
        run(folder, ids, out, resume=True)
    same(out, whole)


def test_a_signal_that_comes_when_all_is_done_interrupts_nothing(folder, ids, tmp_path, monkeypatch):
    drop = checkpoint.drop

    def told(out, but=None):
        drop(out, but)
        if but is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "drop", told)
    _, result = run(folder, ids, tmp_path / "out", max_steps=2)
    assert (result.reason, result.signal) == ("finished", None)


def test_a_run_that_goes_on_has_max_time_again(folder, ids, tmp_path, monkeypatch):
    now, step = [0.0], Trainer._step

    def passing() -> float:
        now[0] += 1e-3
        return now[0]

    def slow(self):
        step(self)
        now[0] += 10

    monkeypatch.setattr("model.finetune.train.time", SimpleNamespace(monotonic=passing))
    monkeypatch.setattr(Trainer, "_step", slow)
    for steps in (3, 6):
        _, result = run(folder, ids, tmp_path / "out", max_time=25, resume=steps > 3)
        assert (result.reason, result.steps) == ("max_time", steps)
    assert result.seconds > 60


def test_a_checkpoint_has_no_pickle_and_is_whole(folder, ids, tmp_path):
    out = tmp_path / "out"
    run(folder, ids, out, max_time=1e-9)
    (kept,) = out.glob("checkpoint*")
    assert {path.name for path in kept.iterdir()} == {"training.safetensors", "training.json"}
    document = json.loads((kept / "training.json").read_text())
    assert document["progress"]["step"] == 1
    assert document["started"]["settings"]["learning_rate"] == 1e-3
    names = checkpoint.safe_open(kept / "training.safetensors", "np").keys()
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {"weight", "first_moment", "second_moment", "best"}


# --- what goes wrong while it is written


def test_a_disk_that_is_full_leaves_the_checkpoint_before(folder, ids, whole, tmp_path, monkeypatch):
    """A limit on the size of a file stands for the disk: no root is needed."""
    out, write = tmp_path / "out", checkpoint.write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(out, step, *rest):
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        write(out, step, *rest)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write", full)
            line = refused(lambda: run(folder, ids, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"{out}/checkpoint-8: cannot be written: File too large"
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == ["checkpoint-6"]
    run(folder, ids, out, resume=True)
    same(out, whole)


COMMAND = """
import sys, model
folder, data, out, how, options = sys.argv[1:]
model.load(folder, device="cpu").finetune(data, out=out, resume=how == "resume", **eval(options))
"""


def test_a_process_that_is_killed_goes_on_to_the_same_bits(folder, ids, whole, tmp_path):
    """SIGKILL, twice, at whatever it is doing."""
    out, data = tmp_path / "out", tmp_path / "ids.npy"
    np.save(data, ids)

    def start(how: str) -> subprocess.Popen:
        # Saves at every step, so that most of the time is spent in one.
        arguments = [folder, data, out, how, repr(OPTIONS | {"save_every": 1})]
        return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.DEVNULL)

    for how, step in (("new", 3), ("resume", 9)):
        process = start(how)
        while process.poll() is None and len(logged(out)) < step:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("resume").wait() == 0
    assert weights(out) == weights(whole)


def logged(out: Path) -> list[str]:
    log = out / "log.jsonl"
    return [line for line in log.read_text().splitlines() if '"kind": "step"' in line] if log.exists() else []


# --- what cannot be resumed


@pytest.fixture
def stopped(folder, ids, tmp_path):
    out = tmp_path / "out"
    run(folder, ids, out, max_time=1e-9)
    return out


def refused(call) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    return str(caught.value)


def test_another_run_is_refused_by_name(folder, ids, stopped, tmp_path, monkeypatch):
    before = sorted((path, path.stat().st_mtime_ns) for path in stopped.rglob("*"))
    again = {"resume": True, "out": stopped}
    assert (
        refused(lambda: run(folder, ids, learning_rate=0.5, clip=None, **again)).splitlines()
        == [
            f"{stopped}: the run was started with settings: clip 1.0, not None",
            f"{stopped}: the run was started with settings: learning_rate 0.001, not 0.5",
        ]
    )  # fmt: skip
    assert "the run was started with data: contents" in refused(lambda: run(folder, ids + ids % 2, **again))
    assert "data: windows" in refused(lambda: run(folder, ids[:-10], **again))
    other = load(folder)
    other.parameters["norm.bias"][0] += 1
    assert "model: weights" in refused(lambda: other.finetune(ids, console=QUIET, **again, **OPTIONS))
    wider = finetuning.folder_of(tmp_path / "wider", n_inner=64)
    assert "model: n_inner None, not 64" in refused(lambda: run(wider, ids, **again))
    monkeypatch.setattr("model.finetune.run._started", lambda *a: changed(stopped))
    assert "the run was started with processes 1, not 2" in refused(lambda: run(folder, ids, **again))
    assert sorted((path, path.stat().st_mtime_ns) for path in stopped.rglob("*")) == before


def changed(out: Path) -> dict:
    return json.loads((checkpoint.newest(out) / "training.json").read_text())["started"] | {"processes": 2}


def test_a_folder_that_exists_is_not_written_to(folder, ids, stopped, whole, tmp_path):
    assert refused(lambda: run(folder, ids, stopped)).startswith(f"{stopped}: exists; ")
    assert "has finished" in refused(lambda: run(folder, ids, whole, resume=True))
    assert "does not exist" in refused(lambda: run(folder, ids, tmp_path / "no", resume=True))
    assert "resume needs the folder" in refused(lambda: run(folder, ids, None, resume=True))
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(lambda: run(folder, ids, tmp_path / "file"))


@pytest.mark.parametrize("damage", ["cut", "another", "no json", "version"])
def test_a_damaged_checkpoint_is_one_sentence(folder, ids, stopped, damage):
    kept = checkpoint.newest(stopped)
    tensors, document = kept / "training.safetensors", kept / "training.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:5000])
    elif damage == "another":
        shutil.copy(stopped / "model.safetensors", tensors)
    elif damage == "no json":
        document.write_text("{")
    else:
        document.write_text(document.read_text().replace('"version": 1', '"version": 9'))
    (line,) = refused(lambda: run(folder, ids, stopped, resume=True)).splitlines()
    assert str(document if damage in ("no json", "version") else tensors) in line


# --- what comes of it


def test_transformers_loads_the_result_and_agrees(folder, ids, whole):
    judge = Judge(whole)
    for device in ("cpu", torch.device("cpu")):
        lm = model.load(whole, device=device)
        for shape in judge.windows:
            expected = judge.expected(*shape)
            expected.check(lm.logits(expected.ids))


def test_the_model_that_was_given_has_the_result(folder, ids, whole, tmp_path):
    lm, _ = run(folder, ids, None)
    trained = load(whole)
    for name, array in lm.parameters.items():
        np.testing.assert_array_equal(array, trained.parameters[name])


def test_a_float16_model_is_trained_exactly_and_rounded_at_the_end(folder, ids):
    lm = model.load(folder, device="cpu", dtype="float16")
    before = {name: array.copy() for name, array in lm.parameters.items()}
    lm.finetune(ids, console=QUIET, **OPTIONS)
    assert all(array.dtype == np.float16 for array in lm.parameters.values())
    assert any((array != before[name]).any() for name, array in lm.parameters.items())


def test_what_is_frozen_keeps_its_bits(folder, ids):
    before = load(folder).parameters
    lm, _ = run(folder, ids, None, freeze=["tokens.weight", "blocks.*"], unfreeze=["blocks.1.up.*"], validation=0)
    changed = {name for name, array in lm.parameters.items() if (array != before[name]).any()}
    assert changed == {"positions.weight", "norm.weight", "norm.bias", "blocks.1.up.weight", "blocks.1.up.bias"}
