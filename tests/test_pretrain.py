"""The recipe of the embedded model: its measure gives the figure that is known, and its run starts."""

import types

import numpy as np
import pytest
import torch
from reference import from_pretrained
from rich.console import Console

import model
from bench import pretrain
from model.load import locate


def test_the_embedded_models_loss_is_transformers():
    lm = model.load("tiny-gpt2", device="cpu", dtype="float32")
    ids = pretrain.stream("val.txt", lm.tokenizer)
    assert len(ids) == 25703
    assert pretrain.windows(ids).shape == (50, 512)
    batch = torch.from_numpy(pretrain.windows(ids)[:4]).long()
    with torch.no_grad():
        theirs = from_pretrained(locate("tiny-gpt2"))(batch, labels=batch).loss.item()
    # Of all 50 windows, which take longer, it is 2.951. Two float32 forward passes that sum in other orders.
    assert theirs == pytest.approx(2.7717, abs=5e-4)
    assert pretrain.validation_loss(lm, 4) == pytest.approx(theirs, rel=1e-5)


def test_the_trainers_validation_loss_is_the_same_measure():
    lm = model.load("tiny-gpt2", device="cpu", dtype="float32")
    rows = pretrain.windows(pretrain.stream("val.txt", lm.tokenizer))[:2]
    want = pretrain.validation_loss(lm, 2)
    said = []
    tracker = types.SimpleNamespace(log=said.append, close=lambda: None)
    options = {**pretrain.OPTIONS, "batch_size": 1, "max_steps": 1, "warmup": 0}
    lm.finetune(rows, validation_data=rows, console=Console(quiet=True), trackers=[tracker], **options)
    assert said[0]["kind"] == "evaluation"
    # Two float32 forward passes that sum in other orders.
    assert said[0]["validation_loss"] == pytest.approx(want, rel=1e-5)


def test_the_recipe_starts_stops_and_goes_on(tmp_path, monkeypatch):
    stream = pretrain.stream
    monkeypatch.setattr(pretrain, "stream", lambda name, tokenizer: stream("val.txt", tokenizer)[:1100])
    monkeypatch.setattr(pretrain, "OPTIONS", {**pretrain.OPTIONS, "batch_size": 4, "warmup": 1})
    begun = pretrain.train(tmp_path, max_time=1e-9)
    assert begun["reason"] == "max_time"
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(pretrain, "validation_loss", lambda lm: 1.5)
    ended = pretrain.train(tmp_path, resume=True)
    assert (ended["reason"], ended["steps"], ended["validation_loss"]) == (
        "finished",
        3,
        1.5,
    )  # 9 windows, 4 a step
    found = model.load(tmp_path / "model", device="cpu")
    assert found.config == model.load("tiny-gpt2", device="cpu").config
    assert found.generate("And", max_new_tokens=2).tokens


def test_each_pass_cuts_the_text_at_another_place():
    ids = np.arange(5000)
    assert (pretrain.windows(ids)[1] == np.arange(512, 1024)).all()
    assert (pretrain.windows(ids, 73)[0] == np.arange(73, 585)).all()
    assert len(pretrain.windows(ids, 400)) == 8
