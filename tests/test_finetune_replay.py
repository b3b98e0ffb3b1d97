"""Passes that are captured and replayed: the same bits as launched ones. The capture runs its function here."""

import finetuning
import pytest
import torch
from decoding import replayed
from finetuning import QUIET, documents, load, trainer

from model.errors import TrainingError
from model.finetune.replay import Replayed
from model.finetune.settings import Settings


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def replaying(lm, captured: list, **options):
    """A run whose passes are replayed; `captured` gets the result of each capture."""
    run = trainer(lm, documents(14), batch_size=4, epochs=2, **options)

    def capture(function):
        captured.append(replayed(function))
        return captured[-1]

    run.graphs = Replayed(capture)
    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_replayed_steps_are_launched_ones_to_the_bit(lm, dtype):
    captured: list = []
    run, plain = replaying(lm, captured, dtype=dtype), trainer(lm, documents(14), batch_size=4, epochs=2, dtype=dtype)
    last = run.train.of_step(run.train.steps - 1)
    assert 0 < len(last) < 4
    for step in range(run.steps):
        found, wanted = run.gradient(step), plain.gradient(step)
        assert found == wanted
        assert torch.equal(run.optimizer.whole, plain.optimizer.whole)
        for each in (run, plain):
            each.optimizer.step(1e-3, 0.5 / each.scale.value)
            each.scale.update(step != 1)  # what losses are multiplied by changes on the way
    assert torch.equal(run.optimizer.parameter, plain.optimizer.parameter)
    assert len(captured) == 2  # a whole batch, and an epoch's last


def test_windows_of_one_document_have_a_graph_of_their_own(lm):
    captured: list = []
    run = replaying(lm, captured)
    first = next(run.train.passes(run.train.of_step(0), run.device))
    factor = torch.ones((), dtype=torch.float64)
    for documents_ in (first[3], None, first[3], None):
        batch = (*first[:3], documents_)
        found = run.graphs(run._pass, *batch, factor).clone()
        assert torch.equal(found, run.network(*batch).detach())
    assert len(captured) == 2


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"dropout": 0.1}, {"fsdp": True}], ids=str)
def test_what_is_not_replayed_is_refused(options):
    with pytest.raises(TrainingError, match="cuda_graph is for whole steps of one process: it goes without"):
        Settings(cuda_graph=True, **options)


def test_the_cpu_has_no_graphs(lm):
    with pytest.raises(TrainingError, match="cuda_graph needs a model on CUDA"):
        lm.finetune("some text", cuda_graph=True, console=QUIET)


def test_a_run_is_resumed_with_and_without():
    assert Settings(cuda_graph=True).decisive() == Settings().decisive()
