"""The options of a run: numbers of any kind and size, and lists, before anything is read."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from finetuning import QUIET, folder_of, load

import model
from model.errors import ModelError, TrainingError
from model.finetune.progress import Progress
from model.finetune.settings import Settings

NUMBERS = ("learning_rate", "warmup", "floor", "weight_decay", "eps", "clip", "max_time", "dropout", "validation")
COUNTS = ("epochs", "batch_size", "context", "accumulate", "max_steps", "evaluate_every", "patience", "save_every")


@pytest.mark.parametrize("name", [*NUMBERS, *COUNTS, "seed"])
def test_an_integer_beyond_all_floats_is_refused_by_name(name):
    with pytest.raises(TrainingError, match=f"^{name} must be .*, got 1000"):
        Settings.of({name: 10**400})


def test_an_integer_beyond_all_floats_is_no_beta_and_no_alpha():
    with pytest.raises(TrainingError, match="betas must be two numbers"):
        Settings.of({"betas": (0.9, 10**400)})
    with pytest.raises(TrainingError, match="alpha of adapters must be a number above 0"):
        Settings.of({"lora_rank": 2, "lora_alpha": 10**400})


@pytest.mark.parametrize("name", COUNTS)
def test_more_than_anyone_counts_is_refused(name):
    with pytest.raises(TrainingError, match=f"{name} must be at most 2147483648, got 2147483649"):
        Settings.of({name: 2**31 + 1})


def test_a_seed_that_torch_would_not_take_is_refused():
    assert Settings.of({"seed": 2**63 - 1}).seed == 2**63 - 1
    for seed in (-1, 2**63):
        with pytest.raises(TrainingError, match=rf"seed must be a whole number from 0 to 2\*\*63 - 1, got {seed}"):
            Settings.of({"seed": seed})


def test_a_run_of_ages_has_a_line_of_figures():
    line = Progress(2**62, 0, QUIET).line({"step": 1, "loss": 1.0})
    assert "step 1/" in line
    assert "left" not in line


@pytest.mark.parametrize("name", ["freeze", "unfreeze", "lora_targets"])
@pytest.mark.parametrize("value", [[5], ["blocks.*", None]])
def test_a_pattern_that_is_no_text_is_refused(name, value):
    with pytest.raises(TrainingError, match=f"{name} must be a list of patterns, which are text"):
        Settings.of({"lora_rank": 2 if name == "lora_targets" else None, name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.type is bool])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(TrainingError, match=f"{name} must be True or False, got {value!r}"):
        Settings.of({name: value})


def test_an_alpha_of_no_adapters_is_refused_whatever_it_is():
    with pytest.raises(TrainingError, match="lora_alpha is of adapters, and there are none"):
        Settings.of({"lora_alpha": 0})


def test_an_adapter_that_is_kept_needs_a_folder(tmp_path):
    lm = load(folder_of(tmp_path / "model"))
    with pytest.raises(TrainingError, match="keep_adapter writes into the run's folder: give one"):
        lm.finetune(np.arange(60), max_steps=1, console=QUIET, keep_adapter=True, lora_rank=2)


def test_layers_of_thousands_of_digits_are_refused(tmp_path):
    lm = load(folder_of(tmp_path / "model"))
    with pytest.raises(ModelError, match="layers must be like"):
        lm.finetune(np.arange(60), layers="9" * 5000, context=24, console=QUIET)


def test_numpys_numbers_are_pythons_in_the_checkpoints(tmp_path):
    """A sweep over `np.arange` or `np.logspace`: JSON has none of NumPy's numbers, nor has torch's seed."""
    lm, ids = load(folder_of(tmp_path / "model")), np.arange(400) % 97
    counts = dict.fromkeys(("epochs", "batch_size", "accumulate", "save_every", "evaluate_every"), np.int64(1))
    options = {**counts, "context": np.int32(24), "seed": np.uint8(3), "max_steps": np.int64(2)}
    options |= {"learning_rate": np.float32(1e-3), "dropout": np.float64(0), "betas": (np.float32(0.9), 0.99)}
    options |= {"lora_rank": np.int64(2), "recompute": np.bool_(False)}
    out = tmp_path / "out"
    assert lm.finetune(ids, out=out, console=QUIET, **{**options, "max_time": np.float32(1e-9)}).reason == "max_time"
    lm = load(tmp_path / "model")
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    plain["betas"] = (float(np.float32(0.9)), 0.99)
    assert lm.finetune(ids, out=out, resume=True, console=QUIET, **plain).reason == "finished"


def test_a_window_is_no_longer_than_the_context_that_was_asked_for(tmp_path):
    lm = model.load("tiny-gpt2", device="cpu", context=48)
    with pytest.raises(TrainingError, match="context is 49, but the model has 48 positions"):
        lm.finetune(["And God said."] * 40, context=49, max_steps=1, out=tmp_path / "out", console=QUIET)
    assert Settings.of({}).window(lm.positions) == 48
    assert Settings.of({}).window(2048) == 1024


def test_a_share_that_is_not_used_is_nothing_to_differ_in(tmp_path):
    """A run that the command began can be gone on with by a program, whose share may be another."""
    folder, ids = folder_of(tmp_path / "model"), np.arange(400) % 97
    options = {"validation_data": ids[:50], "out": tmp_path / "out", "max_steps": 2, "console": QUIET}
    load(folder).finetune(ids, validation=0.0, max_time=1e-9, **options)
    assert load(folder).finetune(ids, resume=True, **options).reason == "finished"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torch_around_a_run_change_nothing(tmp_path, mode):
    folder, ids = folder_of(tmp_path / "model"), np.arange(400) % 97
    alone, inside = load(folder), load(folder)
    alone.finetune(ids, max_steps=2, console=QUIET)
    with mode():
        inside.finetune(ids, max_steps=2, console=QUIET)
    assert all((alone.parameters[name] == inside.parameters[name]).all() for name in alone.parameters)


def test_a_model_that_was_loaded_for_inference_alone_is_refused(tmp_path):
    folder = folder_of(tmp_path / "model")
    with torch.inference_mode():
        lm = model.load(folder, device=torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"loaded under torch\.inference_mode and cannot"):
        lm.finetune(np.arange(60), max_steps=1, console=QUIET)
