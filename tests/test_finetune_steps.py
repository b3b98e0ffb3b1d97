"""What a step of training is: transformers' losses and gradients, whole batches in parts, documents apart."""

import copy
import math

import finetuning
import numpy as np
import pytest
import reference_llama
import torch
from finetuning import CONTEXT, VOCABULARY, documents, load, other, quiet_log, trainer
from reference import from_pretrained, read_config

from model import gpt2
from model.architecture import architecture
from model.errors import TrainingError
from model.finetune.batches import Batches
from model.finetune.distributed import World
from model.finetune.optimizer import LossScale, Optimizer, clipping
from model.finetune.packing import IGNORE, Windows, pack
from model.names import HEAD

UNIT = 2.0**-24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finetuning.folder_of(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def lm(folder):
    return load(folder)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (count, CONTEXT)).astype(np.int32)


# --- transformers, on the same data in the same order


class Theirs:
    """transformers' model and torch's AdamW; matrices alone decay."""

    def __init__(self, network: torch.nn.Module, decay: float, rate: float):
        self.network = network.train()
        groups = [[p for p in network.parameters() if (p.ndim >= 2) is matrix] for matrix in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}], lr=rate
        )

    def gradient(self, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        self.optimizer.zero_grad()
        loss = self.network(ids, labels=ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.double().clone() for name, p in self.network.named_parameters()}

    def step(self, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


@pytest.mark.parametrize(
    "name", ["default", "untied odd", "by layer", "llama, biases", "llama, tied", "mistral, window 7"]
)
def test_losses_and_gradients_are_transformers(tmp_path, name):
    folder = finetuning.folder_of(tmp_path / "model", name)
    ids = np.random.default_rng(1).integers(0, 97, (30, CONTEXT)).astype(np.int32)
    # Every token but the first is a target: in transformers' mean and in ours.
    train = [finetuning.Document(row, np.ones(CONTEXT, bool)) for row in ids]
    lm = load(folder)
    options = {"batch_size": 4, "epochs": 3, "max_steps": 20, "weight_decay": 0.1, "seed": 3}
    ours = trainer(lm, train, dtype=torch.float32, **options)
    gpt2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    changes = gpt2 if read_config(folder)["model_type"] == "gpt2" else {}
    single = from_pretrained(folder, **changes)
    double = copy.deepcopy(single).double()
    double.set_attn_implementation("eager")
    reference_llama.widen(double)
    theirs = [Theirs(network, 0.1, 1e-3) for network in (single, double)]

    slots, distances, errors = lm.parameters.slots, [], []
    for step in range(20):
        batch = torch.from_numpy(ours.train.windows.tokens[ours.train.of_step(step)]).long()
        (loss32, found32), (loss64, found64) = (each.gradient(batch) for each in theirs)
        total, targets = ours.gradient(step)
        distances.append(abs(loss32 - loss64))
        errors.append(abs(total.item() / targets - loss64))
        if step == 0:
            for ours_name, slot in slots.items():
                key = slot.source if slot.source == HEAD else f"{architecture(lm.config).PREFIX}{slot.source}"
                mine = ours.optimizer.view(ours.optimizer.gradient, ours_name).double()
                mine = mine.T if slot.transposed else mine
                # Absolutely: the true gradient of the keys' part of c_attn.bias is 0.
                limit = 2 * (found32[key] - found64[key]).abs().max() + 64 * UNIT * found64[key].abs().max()
                assert (mine - found64[key]).abs().max() <= limit, ours_name
        rate = ours.rates(step)
        norm = ours.optimizer.norm().item()
        ours.optimizer.step(rate, clipping(norm, 1.0))
        for each in theirs:
            each.step(rate)
    # What float32 comes to here is the judge's own distance from float64, or a few roundings of the loss.
    assert max(errors) <= max(2 * max(distances), 8 * UNIT * loss64)


# --- a batch in parts


def gradient_of(run, step: int = 0) -> torch.Tensor:
    run.gradient(step)
    return run.optimizer.whole.clone()


@pytest.mark.parametrize("shape", [(1, 7), (2, 4), (3, 3), (7, 1)])
def test_the_gradient_of_parts_is_that_of_the_whole(lm, shape):
    """Windows with different numbers of targets; 2 x 4 and 3 x 3 leave passes with fewer windows."""
    run = trainer(lm, documents(14), batch_size=7, epochs=1)
    assert 7 < len(run.train.windows.tokens) < 14
    counts = (run.train.windows.targets != IGNORE).sum(1)
    assert len(set(counts.tolist())) > 3
    size, accumulate = shape
    whole = gradient_of(run)
    parts = other(run, batch_size=size, accumulate=accumulate)
    parts.train = copy.copy(parts.train)
    numbers = run.train.of_step(0)
    object.__setattr__(parts.train, "of_step", lambda step: numbers)
    found = gradient_of(parts)
    # float64: sums of a few hundred terms, in another order.
    assert (found - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_the_ragged_last_batch_is_a_mean_over_its_own_targets(lm):
    run = trainer(lm, documents(14), batch_size=2, accumulate=2, epochs=1)
    last = run.train.steps - 1
    numbers = run.train.of_step(last)
    assert 0 < len(numbers) < 4
    total, targets = run.gradient(last)
    found = run.optimizer.whole.clone()
    run.optimizer.zero()
    (batch,) = Batches(run.train.windows, len(numbers), 1, 0, World()).passes(numbers, torch.device("cpu"))
    assert targets == (batch[1] != IGNORE).sum()
    mean = run.network(*batch) / targets
    mean.backward()
    run.optimizer.collect()
    assert abs(total.item() / targets - mean.item()) <= 1e-12
    assert (found - run.optimizer.gradient).abs().max() <= 1e-12 * found.abs().max()


def test_ranks_share_a_batch_and_all_have_as_many_passes(lm):
    """Two processes' parts, without the processes: their gradients add up to that of one with the double batch."""
    run = trainer(lm, documents(14), batch_size=4, epochs=1)
    for step in range(run.train.steps):
        whole = gradient_of(run, step)
        run.optimizer.zero()
        shares = [Batches(run.train.windows, 2, 1, 0, World(rank, 2)) for rank in (0, 1)]
        passes = [list(share.passes(share.of_step(step), torch.device("cpu"))) for share in shares]
        assert len(passes[0]) == len(passes[1])
        targets = shares[0].targets(shares[0].of_step(step))
        for batch in (*passes[0], *passes[1]):
            (run.network(*batch) / targets).backward()
        run.optimizer.collect()
        assert (whole - run.optimizer.gradient).abs().max() <= 1e-12 * whole.abs().max()


def test_a_low_precision_gradient_is_summed_in_float32(lm):
    run = trainer(lm, documents(14), batch_size=1, accumulate=8, epochs=1, dtype=torch.bfloat16)
    exact = trainer(lm, documents(14), batch_size=8, epochs=1)
    exact.network.load_state_dict(run.network.state_dict())
    truth, found = gradient_of(exact), gradient_of(run)
    assert found.dtype == torch.float32
    # One backward pass in bfloat16 is off by a few percent of the largest; a bfloat16 sum of 8 would stick out.
    assert (found - truth).abs().max() <= 0.05 * truth.abs().max()


def test_recomputing_changes_no_bit(lm):
    run = trainer(lm, documents(14), batch_size=4, dtype=torch.float32)
    plain = gradient_of(run)
    run.network.recompute = True
    assert torch.equal(plain, gradient_of(run))


# --- documents that share a window


def losses(lm, windows: Windows) -> torch.Tensor:
    run = trainer(lm, documents(2), dtype=torch.float32)
    tokens, targets, positions, numbers = (torch.from_numpy(each) for each in windows)
    x = gpt2.embed(run.network, tokens, positions)
    for block in run.network.blocks:
        x = block(x, positions, numbers)
    return gpt2.loss(run.network, lm.config, x, targets, reduction="none").detach()


def test_a_document_knows_nothing_of_its_neighbours(lm):
    windows = pack(documents(30, longest=14), CONTEXT)
    before = losses(lm, windows)
    changed = windows._replace(tokens=windows.tokens.copy())
    first = windows.documents == 0
    changed.tokens[first] = (changed.tokens[first] + 1) % VOCABULARY
    after = losses(lm, changed)
    others = torch.from_numpy(~first)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_a_packed_document_has_the_losses_that_it_has_alone(lm):
    pieces = documents(12, longest=14)
    windows = pack(pieces, CONTEXT)
    assert len(windows.tokens) < len(pieces)
    packed = losses(lm, windows).sum().item()
    alone = sum(losses(lm, pack([piece], CONTEXT)).sum().item() for piece in pieces)
    assert abs(packed - alone) <= 1e-5 * abs(alone)


# --- the optimizer's buffers


def test_matrices_decay_and_nothing_else(lm):
    run = trainer(lm, documents(4), weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    run.optimizer.zero()
    run.optimizer.step(0.1)
    for name, parameter in run.network.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-12, atol=0)


def test_pieces_of_an_update_are_the_whole_update(lm, monkeypatch):
    results = []
    for size in (2**30, 1000):
        monkeypatch.setattr("model.finetune.optimizer._PIECE", size)
        run = trainer(lm, documents(8), batch_size=4, weight_decay=0.5, dtype=torch.float32)
        for step in range(2):
            run.gradient(step)
            run.optimizer.step(0.01, 0.5)
        results.append(run.optimizer.parameter.clone())
    assert torch.equal(*results)


def test_a_float16_weight_moves_by_less_than_it_can_show():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = Optimizer([("x", parameter)])
    for _ in range(20):
        optimizer.gradient.fill_(1.0)
        optimizer.step(1e-4)
    # Each update is a fifth of float16's step below 1, and would be rounded away.
    assert abs(parameter[0].item() - (1 - 20e-4)) < 2.0**-11
    assert optimizer.master.dtype == torch.float32


def test_clipping_is_to_the_norm():
    assert clipping(4.0, 1.0) == 0.25
    assert clipping(0.5, 1.0) == clipping(100.0, None) == 1.0


# --- gradients that are not finite


def test_the_loss_scale_is_halved_and_doubled():
    scale = LossScale.of(torch.float16)
    scale.interval = 3
    assert scale.value == 65536
    scale.update(False)
    assert scale.value == 32768
    for _ in range(3):
        scale.update(True)
    assert (scale.value, scale.good) == (65536, 0)
    for dtype in (torch.float32, torch.bfloat16):
        still = LossScale.of(dtype)
        still.update(False)
        assert still.value == 1


def test_a_gradient_that_overflows_is_skipped_and_counted(lm):
    """In float16 with a loss scale that is far too large: steps change nothing until it has come down."""
    run = trainer(lm, documents(40), batch_size=4, epochs=2, dtype=torch.float16, evaluate_every=100)
    run.scale.value = 2.0**30
    seen = []

    class Watch:
        def step(self, record):
            seen.append((record, run.optimizer.master.clone()))

    run.run(Watch())
    skipped = run.progress.skipped
    assert 5 <= skipped < len(seen)
    for number, (record, values) in enumerate(seen):
        if number < skipped:
            assert not math.isfinite(record["gradient_norm"])
            assert record["skipped"] == number + 1
            assert record["rate"] == run.rates(0)
            assert torch.equal(values, seen[0][1])
    assert run.scale.value == 2.0 ** (30 - skipped)
    assert not torch.equal(seen[-1][1], seen[0][1])
    assert run.optimizer.updates == len(seen) - skipped
    assert run.optimizer.master.isfinite().all()


def test_the_loss_scale_changes_no_gradient(lm):
    """A power of two, and no value that a float16 cannot hold either way."""
    run = trainer(lm, documents(14), batch_size=4, dtype=torch.float32)
    plain = gradient_of(run)
    run.scale.value = 2.0**10
    assert torch.equal(gradient_of(run), 2.0**10 * plain)


def test_weights_that_are_not_finite_are_refused_before_a_step(lm, tmp_path):
    weight = lm.parameters["blocks.1.up.weight"].copy()
    weight[3, :2] = math.nan, math.inf
    lm.parameters["blocks.1.up.weight"] = weight
    before = weight.copy()
    with pytest.raises(TrainingError, match=r"blocks.1.up.*: 2 of \d+ numbers are infinite or NaN"):
        lm.finetune(rows(4), out=tmp_path / "out")
    np.testing.assert_array_equal(lm.parameters["blocks.1.up.weight"], before)


def test_a_run_that_has_diverged_ends_with_a_sentence(lm):
    run = trainer(lm, documents(40), batch_size=1, epochs=5, dtype=torch.float32)
    with torch.no_grad():
        run.network.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="step 30: 30 gradients in a row are not finite"):
        run.run(quiet_log())
    assert run.optimizer.updates == 0


# --- evaluation


def evaluations(lm, found: list[float], monkeypatch, **options):
    run = trainer(lm, documents(12), documents(3, seed=9), batch_size=4, evaluate_every=1, epochs=20, **options)
    values = iter(found)
    monkeypatch.setattr(run, "evaluate", lambda: next(values))
    kept = []
    step = run._step
    monkeypatch.setattr(run, "_step", lambda: (step(), kept.append(run.optimizer.parameter.clone())))
    return run.run(quiet_log()), run, kept


def test_the_best_is_kept_and_a_nan_is_never_best(lm, monkeypatch):
    result, run, kept = evaluations(lm, [math.nan, 3.0, math.nan, 2.0, math.nan, 2.5], monkeypatch, max_steps=5)
    assert (result.best_step, result.validation_loss, result.reason) == (3, 2.0, "finished")
    assert torch.equal(run.optimizer.parameter, kept[2])
    assert not torch.equal(kept[2], kept[4])
    assert result.perplexity == math.exp(2.0)


def test_patience_ends_the_run(lm, monkeypatch):
    result, _, kept = evaluations(lm, [5.0, 4.0, 4.5, math.nan, 4.0, 1.0], monkeypatch, patience=3)
    assert (result.reason, result.best_step, len(kept)) == ("early stopping", 1, 4)


def test_evaluation_is_the_mean_over_targets(lm):
    run = trainer(lm, documents(4), documents(9, seed=5), batch_size=2)
    windows = run.validation.windows
    assert len(windows.tokens) % 2 == 1
    tokens = (torch.from_numpy(each) for each in windows)
    assert abs(run.evaluate() - (run.network(*tokens) / (windows.targets != IGNORE).sum()).item()) <= 1e-12


def test_windows_of_one_document_need_no_mask(lm):
    run = trainer(lm, documents(14), batch_size=20)
    whole = [finetuning.Document(row, np.ones(CONTEXT, bool)) for row in rows(4)]
    alone = trainer(lm, whole, batch_size=4)
    for each, masked in ((run, True), (alone, False)):
        ((*_, numbers),) = each.train.passes(np.arange(len(each.train.windows.tokens)), torch.device("cpu"))
        assert (numbers is not None) == masked
    windows = [torch.from_numpy(each) for each in alone.train.windows]
    assert torch.equal(alone.network(*windows), alone.network(*windows[:3]))


def test_the_order_is_the_seeds(lm):
    train = documents(40)
    batches = [Batches(pack(train, CONTEXT), 4, 1, seed, World()) for seed in (0, 0, 1)]
    epochs = [[np.concatenate([b.of_step(s + e * b.steps) for s in range(b.steps)]) for e in (0, 1)] for b in batches]
    assert all(sorted(epoch) == list(range(len(batches[0].windows.tokens))) for run in epochs for epoch in run)
    assert (epochs[0][0] == epochs[1][0]).all()
    assert (epochs[0][0] != epochs[2][0]).any()
    assert (epochs[0][0] != epochs[0][1]).any()
