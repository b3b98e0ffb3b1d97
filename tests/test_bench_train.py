"""The training benchmark: what is compared does the same steps, and a wrong trainer gets no speed."""

import numpy as np
import pytest

import model
from bench import train
from bench.trainers import Ours, Steps, Transformers
from model.config import GPT2Config


@pytest.fixture(scope="module")
def lm():
    config = GPT2Config(vocab_size=71, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return model.from_config(config, seed=2, device="cpu")


CASE = train.CPU._replace(batch=2, steps=3)


def test_both_trainers_take_the_same_steps(lm, tmp_path):
    lm.save(tmp_path)
    rows = CASE.rows(lm)
    assert rows.shape == (8, 16)
    ours, theirs = (made(tmp_path, "cpu", "float32").train(rows, 2, 4) for made in (Ours, Transformers))
    assert len(ours.losses) == 4
    # The tolerance that the benchmark itself has: float32 losses of 4 nats.
    assert np.abs(np.subtract(ours.losses, theirs.losses)).max() <= CASE.tolerance
    # A rate a tenth off would be seen: the fourth loss has three updates behind it.
    assert abs(ours.losses[3] - ours.losses[0]) > 10 * CASE.tolerance
    assert min(ours.seconds, theirs.seconds, ours.memory, theirs.memory) > 0


class Fake:
    """Stands for a worker whose steps have these losses and take so many seconds."""

    def __init__(self, losses, seconds):
        self._losses, self._seconds = losses, seconds

    def call(self, method, rows, batch, steps):
        return Steps(self._losses, self._seconds, 1000), 0.0

    def close(self):
        pass


def test_a_trainer_with_other_losses_has_no_speed(lm, monkeypatch):
    monkeypatch.setattr("bench.timing.time.sleep", lambda seconds: None)
    workers = {
        "ours": Fake([4.0, 3.9, 3.8], 1.0),
        "transformers eager": Fake([4.0, 3.9, 3.80005], 2.0),
        "transformers compiled": Fake([4.0, 3.9, 3.7], 0.1),
    }
    found = {row["trainer"]: row for row in train.measure(CASE, lm, workers, rounds=2)["rows"]}
    assert found["ours"]["speedup"] == 2.0
    assert found["ours"]["tokens_per_second"] == 3 * 2 * 16
    assert found["ours"]["loss_error"] == pytest.approx(5e-5)
    assert found["ours"]["peak_share"] is None
    assert not found["transformers compiled"]["right"]
    assert "tokens_per_second" not in found["transformers compiled"]
    assert train._cells(found["transformers compiled"])[1] == "wrong losses"
    assert train._cells(found["ours"])[:4] == ("ours", "96", "96-96", "2.00")


def test_a_trainer_that_fails_has_a_row_and_the_other_its_speed(lm, monkeypatch):
    monkeypatch.setattr("bench.timing.time.sleep", lambda seconds: None)

    class Fails(Fake):
        def call(self, *arguments):
            raise RuntimeError("its process ended with code -9")

    workers = {"ours": Fake([4.0, 3.9, 3.8], 1.0), "transformers eager": Fails([], 0)}
    found = train.measure(CASE, lm, workers, rounds=2, faults={"transformers compiled": "no compiler"})["rows"]
    assert [train._cells(row)[1] for row in found] == ["96", "no compiler", "its process ended with code -9"]
