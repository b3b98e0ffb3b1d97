"""GPT-2 on the kernels: transformers' logits and tokens, and a training step that is plain torch's."""

from types import SimpleNamespace

import pytest
import reference
import torch
from kernel_cases import DEVICE
from reference import Judge

import gpukernels
import model
from gpukernels import torch_ops
from model import gpt2

NAMES = ["default", "activation gelu", "by layer", "heads of 5"]


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


def leaves(parameters, dtype) -> SimpleNamespace:
    """Copies that gradients can be asked of, in the groups that the forward pass reads."""

    def copy(group):
        return {name: array.detach().to(dtype).clone().requires_grad_() for name, array in group.items()}

    return SimpleNamespace(
        root=copy(parameters.root), blocks=[copy(group) for group in parameters.blocks], activation_dtype=dtype
    )


def step(parameters, config, ids):
    """The loss of predicting each token's next, and its gradient by every parameter."""
    groups = [parameters.root, *parameters.blocks]
    positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    x = gpt2.hidden_states(parameters, config, ids[:, :-1], positions)
    root = parameters.root
    x = gpukernels.layer_norm(x, root["norm.weight"], root["norm.bias"], eps=config.layer_norm_epsilon)
    loss = gpukernels.linear_cross_entropy(x, root["tokens.weight"], ids[:, 1:])
    return loss, torch.autograd.grad(loss, [array for group in groups for array in group.values()])


def test_a_training_step_is_plain_torchs(judge, kernels_only):
    lm = load(judge("default"))
    ids = torch.from_numpy(judge("default").draw(2, 41)).to(DEVICE)
    truth_loss, truth = step(leaves(lm.parameters, torch.float64), lm.config, ids)
    kernels_only()
    loss, found = step(leaves(lm.parameters, torch.float32), lm.config, ids)

    # Forward and back, a value passes two layers of six ops and the head, each of which rounds it a few times
    # and sums up to 192 terms: with u = 2^-24, (2 * 13 * 4 + 7 sqrt(192)) u of the largest values it meets,
    # which are those of its own array within the factor of a norm's amplification, 8 here.
    limit = 8 * (2 * 13 * 4 + 7 * 192**0.5) * 2.0**-24
    assert abs(loss.item() - truth_loss.item()) <= limit * abs(truth_loss.item())
    for one, other in zip(found, truth, strict=True):
        assert (one.double() - other).abs().max() <= limit * max(1e-2, other.abs().max())
