"""Arguments of the wrong kind: one sentence that has the name, what was wanted, and what came."""

import numpy as np
import pytest
from damage import make
from decoding import MISTRAL
from finetuning import QUIET
from reference import PATHS

import model
from model.errors import CheckpointError, ModelError, TrainingError
from model.gpt2_config import GPT2Config


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "tiny")


@pytest.mark.parametrize("target", [None, "", b"folder", 5, ["folder"], True])
def test_what_is_no_path_is_refused_by_name(folder, monkeypatch, target):
    """The empty text was the folder where the program ran."""
    lm, empty = model.load(folder, device="cpu"), folder / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(CheckpointError) as caught:
        lm.save(target)
    assert caught.value.problems == [f"target must be a path, got {target!r}"]
    with pytest.raises(CheckpointError) as caught:
        lm.load_adapter(target)
    assert caught.value.problems == [f"folder must be a path, got {target!r}"]
    with pytest.raises(CheckpointError) as caught:
        model.load(target, device="cpu")
    assert caught.value.problems == [f"source must be a path, got {target!r}"]
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"progress": 5}, "progress must be a function of two numbers, or None, got 5"),
        ({"revision": 5}, "revision must be text, or None, got 5"),
        ({"cache_dir": 5}, "cache_dir must be a path, got 5"),
        ({"cache_dir": ""}, "cache_dir must be a path, got ''"),
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_kind_is_refused_by_name(options, says):
    with pytest.raises(ModelError) as caught:
        model.load("nobody/nothing", device="cpu", local_files_only=True, **options)
    assert caught.value.problems == [says]


@pytest.mark.parametrize("out", ["", b"folder", 5, ["folder"]])
def test_what_is_no_path_is_no_folder_of_a_run(folder, out):
    lm = model.load(folder, device="cpu")
    with pytest.raises(TrainingError) as caught:
        lm.finetune(np.arange(60), out=out, console=QUIET)
    assert caught.value.problems == [f"out must be a path, got {out!r}"]


@pytest.mark.parametrize("out", ["a\0b", "x" * 300, "~nobody-has-this-name/x"])
def test_a_path_that_cannot_be_is_no_folder_of_a_run(folder, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm = model.load(folder, device="cpu")
    with pytest.raises(TrainingError, match="cannot be a path"):
        lm.finetune(np.arange(60), out=out, console=QUIET)


def test_the_home_folder_of_a_run_is_that_of_load(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lm = model.load(folder, device="cpu")
    lm.finetune(np.arange(60), out="~/out", max_steps=1, keep_adapter=True, lora_rank=1, console=QUIET)
    lm.load_adapter("~/out")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0,), (1, 0), (3, 0), (0, 3)])
@pytest.mark.parametrize("config", [MISTRAL, GPT2Config(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=2)])
def test_no_tokens_have_no_logits(config, shape, path):
    lm = model.from_config(config, device=PATHS[path])
    assert lm.logits(np.zeros(shape, int)).shape == (*((1,) if len(shape) == 1 else ()), *shape, 61)
