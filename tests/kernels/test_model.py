"""GPT-2 on the kernels: transformers' logits and tokens, and a training step that is plain torch's."""

import numpy as np
import pytest
import reference
import torch
from kernel_cases import DEVICE
from reference import Judge

import gpukernels
import model
from gpukernels import torch_ops
from gpukernels.library import registry
from model import gpt2

NAMES = ["default", "activation gelu", "unscaled by layer", "heads 5 wide"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    judges = {}

    def of(name: str) -> Judge:
        if name not in judges:
            reference.build(name).save_pretrained(root / name.replace(" ", "-"))
            judges[name] = Judge(root / name.replace(" ", "-"))
        return judges[name]

    return of


@pytest.fixture(autouse=True)
def no_plain_torch(monkeypatch):
    """Neither a plain op nor torch's own products and norms may stand in for a kernel."""

    def refuse(*args, **options):
        raise AssertionError("plain torch ran")

    for name in ("attention", "layer_norm", "linear", "norm_linear"):
        monkeypatch.setattr(torch_ops, name, refuse)
    for name in ("linear", "layer_norm", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch.nn.functional, name, refuse)


def load(judge: Judge) -> model.LanguageModel:
    return model.load(judge.folder, device=torch.device(DEVICE))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(judge, name, monkeypatch):
    windows = [judge(name).expected(*shape) for shape in ((1, 1), (3, 20))]
    greedy = judge(name).generate(judge(name).draw(1, 9)[0].tolist(), 3)
    lm = load(judge(name))
    for expected in windows:
        expected.check(lm.logits(expected.ids))
    del greedy


def test_greedy_tokens_are_transformers(judge, monkeypatch):
    monkeypatch.setattr(reference, "NEW_TOKENS", 16)
    prompt, tokens = judge("default")._greedy(9)
    lm = load(judge("default"))
    assert lm.generate(prompt, max_new_tokens=len(tokens)).tokens == tokens
    assert len(tokens) == 16
