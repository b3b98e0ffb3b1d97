"""A model whose weights stay on disk: they are the same, and what it cannot do is said."""

import numpy as np
import pytest
from rich.console import Console

import model
from model.config import GPT2Config
from model.finetune import sharding
from model.finetune.distributed import World
from model.on_disk import load_on_disk

CONFIG = GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_weight_is_that_of_the_loaded_model(tmp_path, dtype):
    model.from_config(CONFIG, seed=3, device="cpu", dtype=dtype).save(tmp_path)
    unread, loaded = (load(tmp_path, device="cpu").parameters for load in (load_on_disk, model.load))
    assert list(unread) == list(loaded)
    assert len(unread) == len(loaded)
    for name, array in loaded.items():
        assert unread[name].dtype == np.float32
        assert (unread[name] == array).all()
        assert unread[name] is not unread[name]  # nothing is kept
    assert "head.weight" not in unread
    assert unread.dtype == loaded.dtype == "float32"


@pytest.fixture
def lm(tmp_path):
    model.from_config(CONFIG, seed=3, device="cpu").save(tmp_path / "model")
    return load_on_disk(tmp_path / "model", device="cpu")


def test_it_can_be_trained_in_shards_and_not_run(lm, tmp_path):
    for ask in (
        lambda: lm.logits([1, 2]),
        lambda: lm.generate([1, 2], max_new_tokens=3),
        lambda: lm.save(tmp_path / "copy"),
    ):
        with pytest.raises(model.ModelError, match="on disk only: it can be trained in shards, and nothing else"):
            ask()
    assert not (tmp_path / "copy").exists()
    with pytest.raises(AttributeError):
        lm.parameters.weights  # noqa: B018


def test_shards_want_several_processes(lm, tmp_path):
    def train(**options):
        lm.finetune(np.arange(1, 40), out=tmp_path / "out", console=Console(quiet=True), **options)

    with pytest.raises(model.ModelError, match="fsdp shards over several processes: start them with torchrun"):
        train(fsdp=True)
    with pytest.raises(model.ModelError, match="on disk only, from where fsdp reads them; load the model"):
        train()
    assert not (tmp_path / "out").exists()


def test_shards_want_a_torch_that_adds_gradients_up(monkeypatch):
    monkeypatch.delattr(sharding.FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(model.ModelError, match="fsdp needs a newer torch than"):
        sharding.shard(None, World(0, 2), None)


def test_a_file_that_has_gone_is_named(lm, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(model.CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        lm.parameters["norm.weight"]
