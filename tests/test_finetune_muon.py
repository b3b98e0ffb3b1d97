"""Muon against its polynomial in float64, on the singular values themselves, and what else it promises."""

import finetuning
import numpy as np
import pytest
import torch
from finetuning import QUIET, VOCABULARY, documents, load, trainer

from model.errors import TrainingError
from model.finetune.muon import MOMENTUM, muon, orthogonalized
from model.finetune.settings import Settings


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def polar(matrix: np.ndarray) -> np.ndarray:
    """What five rounds come to: the polynomial of each singular value, between the vectors it had."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ np.diag(values) @ right


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 9), (9, 1)], ids=str)
def test_singular_values_go_through_the_polynomial(shape):
    matrices = np.random.default_rng(0).standard_normal((3, *shape))
    found = orthogonalized(torch.from_numpy(matrices))
    np.testing.assert_allclose(found, [polar(each) for each in matrices], rtol=0, atol=1e-12)


def test_a_gradient_of_zero_moves_nothing():
    weight = torch.ones(4, 3, dtype=torch.float64)
    muon(weight, torch.zeros_like(weight), torch.zeros_like(weight), learning_rate=0.1)
    assert (weight == 1).all()


@pytest.mark.parametrize("stacked", [1, 3])
def test_updates_are_those_of_the_formula(stacked):
    random = np.random.default_rng(1)
    exact, moment = random.standard_normal((12, 5)), np.zeros((12, 5))
    weight, momentum = torch.tensor(exact), torch.zeros(12, 5, dtype=torch.float64)
    for rate in (0.1, 0.03):
        gradient = random.standard_normal((12, 5))
        muon(weight, torch.tensor(gradient), momentum, learning_rate=rate, weight_decay=0.5, stacked=stacked)
        moment = MOMENTUM * moment + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * moment + (1 - MOMENTUM) * gradient
        parts = ahead.reshape(stacked, -1, 5)
        change = np.concatenate([polar(part) for part in parts])
        exact = exact - rate * (0.5 * exact + 0.2 * np.sqrt(max(parts.shape[1:])) * change)
        np.testing.assert_allclose(weight, exact, rtol=0, atol=1e-12)


def one_step(lm, **options):
    """A run behind its first update, by a rate of 1e-3 and half of the gradient."""
    run = trainer(lm, documents(8), batch_size=2, weight_decay=0.1, clip=None, **options)
    run.gradient(0)
    run.optimizer.step(1e-3, 0.5)
    return run


def test_the_matrices_of_blocks_are_muons_and_the_rest_is_adamws(lm):
    before = trainer(lm, documents(8)).network.state_dict()
    run, plain = one_step(lm, optimizer="muon"), one_step(lm)
    theirs, matrices = plain.network.state_dict(), run.optimizer.matrices
    assert sorted(matrices) == sorted(
        f"blocks.{block}.{layer}.weight"
        for block in range(lm.config.n_layer)
        for layer in ("qkv", "projection", "up", "down")
    )
    assert not {f"second_moment/{name}" for name in matrices} & run.optimizer.state().keys()
    for name, found in run.network.state_dict().items():
        if name in matrices:
            expected, gradient = before[name].clone(), 0.5 * plain.optimizer.view(plain.optimizer.gradient, name)
            stacked = 3 if "qkv" in name else 1
            options = {"learning_rate": 1e-3, "weight_decay": 0.1, "stacked": stacked}
            muon(expected, gradient, torch.zeros_like(gradient), **options)
        else:
            expected = theirs[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_float16_matrix_is_its_exact_value_rounded(lm):
    optimizer = one_step(lm, optimizer="muon", dtype=torch.float16).optimizer
    before = trainer(lm, documents(8)).network.state_dict()
    for name in optimizer.matrices:
        exact = optimizer.view(optimizer.master, name)
        assert exact.dtype == torch.float32
        assert torch.equal(optimizer.view(optimizer.parameter, name), exact.half())
        assert not torch.equal(exact, before[name].half().float())


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(lm, tmp_path, monkeypatch):
    monkeypatch.setattr("model.finetune.log.plot", lambda records, path: None)  # it takes as long as the runs
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (30, 24)).astype(np.int32)
    options = {"optimizer": "muon", "max_steps": 4, "batch_size": 2, "evaluate_every": 2, "learning_rate": 1e-2}
    lm.save(tmp_path / "start")

    def run(name, **more):
        out = tmp_path / name
        result = load(tmp_path / "start").finetune(ids, out=out, console=QUIET, **options, **more)
        return result.steps, finetuning.weights(out)

    whole = run("whole")
    assert run("parts", max_time=1e-9)[0] == 1
    assert run("parts", max_time=1e-9, resume=True)[0] == 2
    assert run("parts", resume=True) == whole


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"optimizer": "muon", "lora_rank": 2}, "adapters are parts of them: choose adamw"),
        ({"optimizer": "muon", "fsdp": True}, "fsdp has parts of them: choose adamw"),
    ],
)
def test_what_it_cannot_move_is_refused(options, line):
    with pytest.raises(TrainingError) as refusal:
        Settings.of(options)
    assert line in str(refusal.value)
