"""Models on the kernels: transformers' logits and tokens, and a training step that is plain torch's."""

import pytest
import reference
import torch
from kernel_cases import DEVICE
from reference import Judge

import gpukernels
import model
from gpukernels import torch_ops
from model.finetune.modules import Network

NAMES = ["default", "activation gelu", "by layer", "heads of 5", "llama, llama3", "mistral, window 7"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """`judge(name)`: transformers on a checkpoint of a configuration."""
    root, judges = tmp_path_factory.mktemp("checkpoints"), {}

    def of(name: str) -> Judge:
        if name not in judges:
            folder = root / name.replace(" ", "-")
            reference.build(name).save_pretrained(folder)
            judges[name] = Judge(folder)
        return judges[name]

    return of


def load(judge: Judge) -> model.LanguageModel:
    """In the judge's dtype: by itself a GPU would take float16."""
    return model.load(judge.folder, device=torch.device(DEVICE), dtype="float32")


@pytest.fixture
def kernels_only(monkeypatch):
    """Call it, and no plain op may stand in for a kernel any more."""

    def from_here_on():
        for name in set(gpukernels.__all__) & set(vars(torch_ops)):
            monkeypatch.setattr(torch_ops, name, lambda *args, **options: pytest.fail("plain torch ran"))

    return from_here_on


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(judge, name, kernels_only):
    windows = [judge(name).expected(*shape) for shape in ((1, 1), (3, 20), (1, 70))]
    lm = load(judge(name))
    kernels_only()
    for expected in windows:
        expected.check(lm.logits(expected.ids))


def test_greedy_tokens_are_transformers(judge, monkeypatch, kernels_only):
    monkeypatch.setattr(reference, "NEW_TOKENS", 16)
    prompts, wanted = zip(*(judge("default").greedy(length) for length in (9, 3)), strict=True)
    lm = load(judge("default"))
    kernels_only()
    for result, tokens in zip(lm.generate(list(prompts), max_new_tokens=16), wanted, strict=True):
        assert result.tokens == tokens
        assert len(tokens) == 16


def step(parameters, config, ids, dtype):
    """The loss of predicting each token's next, and its gradient by every parameter."""
    network = Network(parameters, config, dtype=dtype)
    positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    loss = network(ids[:, :-1], ids[:, 1:], positions)
    return loss, torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("name", ["default", "llama, biases"])
def test_a_training_step_is_plain_torchs(judge, name, kernels_only):
    lm = load(judge(name))
    ids = torch.from_numpy(judge(name).draw(2, 41)).to(DEVICE)
    truth_loss, truth = step(lm.parameters, lm.config, ids, torch.float64)
    kernels_only()
    loss, found = step(lm.parameters, lm.config, ids, torch.float32)

    # Forward and back, a value passes two layers of six ops (a LLaMA's: ten) and the head, each of which rounds it a
    # few times and sums up to 192 terms: with u = 2^-24, (2 * 13 * 4 + 7 sqrt(192)) u of the largest values it meets,
    # which are those of its own array within the factor of a norm's amplification, 8 here.
    ops = 13 if name == "default" else 21
    limit = 8 * (2 * ops * 4 + 7 * 192**0.5) * 2.0**-24
    assert abs(loss.item() - truth_loss.item()) <= limit * abs(truth_loss.item())
    for one, other in zip(found, truth, strict=True):
        assert (one.double() - other).abs().max() <= limit * max(1e-2, other.abs().max())
