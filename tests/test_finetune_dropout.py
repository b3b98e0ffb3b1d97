"""Dropout: where transformers drops, from draws that the step fixes."""

import contextlib

import numpy as np
import pytest
import torch
from finetuning import CONTEXT, VOCABULARY, Document, documents, folder_of, load, quiet_log, trainer
from reference import from_pretrained

from model.errors import TrainingError
from model.finetune.dropout import drawn
from model.finetune.settings import Settings

SHARE, SEED = 0.2, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def lm(folder):
    return load(folder)


def test_losses_and_gradients_are_transformers(folder, lm):
    """The same masks: both ask torch for them in the same order, from the same place of its stream."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (12, CONTEXT)).astype(np.int32)
    train = [Document(row, np.ones(CONTEXT, bool)) for row in ids]
    run = trainer(lm, train, batch_size=2, accumulate=2, dropout=SHARE, seed=SEED)
    network = from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", attn_pdrop=0.0)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = SHARE if module.p else 0.0
    network.train()
    for step in range(2):
        batch = torch.from_numpy(run.train.windows.tokens[run.train.of_step(step)]).long()
        network.zero_grad()
        expected = 0.0
        for number, part in enumerate(batch.split(2)):
            with drawn(CPU, SEED, step, number, 0):
                logits = network(part).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten()) / 2
            loss.backward()
            expected += loss.item()
        total, targets = run.gradient(step)
        assert total.item() / targets == pytest.approx(expected, rel=1e-12)
        for name, slot in lm.parameters.slots.items():
            theirs = network.get_parameter(f"transformer.{slot.source}").grad
            ours = run.optimizer.view(run.optimizer.whole, name)
            # float64, in which sums of a few hundred terms are added up in another order.
            limit = 1e-12 * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours.T if slot.transposed else ours, theirs, rtol=0, atol=limit)


def test_recomputed_blocks_drop_the_same(lm):
    runs = [trainer(lm, documents(8), dropout=SHARE, batch_size=4, recompute=recompute) for recompute in (False, True)]
    for run in runs:
        run.gradient(1)
    assert torch.equal(runs[0].optimizer.gradient, runs[1].optimizer.gradient)
    plain = trainer(lm, documents(8), batch_size=4)
    plain.gradient(1)
    assert not torch.equal(plain.optimizer.gradient, runs[0].optimizer.gradient)


def test_an_evaluation_drops_nothing(lm):
    losses = [trainer(lm, documents(8), documents(4), dropout=share).evaluate() for share in (0.0, SHARE)]
    assert losses[0] == losses[1]


def test_every_pass_draws_its_own_and_leaves_torchs_stream_alone(lm):
    def draws(*place):
        with drawn(CPU, *place):
            return torch.rand(8).tolist()

    state = torch.get_rng_state()
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 5, 0, 0)]
    found = [draws(*place) for place in places]
    assert found == [draws(*place) for place in places]
    assert len({tuple(each) for each in found}) == len(places)
    run = trainer(lm, documents(8), dropout=SHARE, epochs=1)
    run.run(quiet_log())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_streams_of_other_gpus_are_left_alone(monkeypatch):
    """torch's own `manual_seed` seeds every GPU's, and only the one that draws gets its stream back."""
    saved, current, seeded = [], [], []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: saved.append(devices) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((seed, *current)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU was seeded"))
    state, gpu = torch.get_rng_state(), torch.device("cuda:1")
    with drawn(CPU, SEED):
        wanted = torch.initial_seed()
    with drawn(gpu, SEED):
        assert torch.initial_seed() == wanted
    assert saved == [[], [gpu]]
    assert seeded == [(wanted, gpu)]
    torch.set_rng_state(state)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1, float("nan"), "0.1", True])
def test_a_share_that_makes_no_sense_is_refused(share):
    with pytest.raises(TrainingError, match="dropout must be a share from 0 to below 1, got"):
        Settings.of({"dropout": share})
