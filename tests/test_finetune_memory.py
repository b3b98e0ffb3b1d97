"""Memory that a run of training does not have: refused with the numbers before anything is made, or explained."""

import pytest
import torch

import model
from model.cli.app import main
from model.errors import OutOfMemoryError

TEXTS = ["In the beginning God created the heaven and the earth. " * 60] * 12
OPTIONS = {"epochs": 1, "max_steps": 1, "batch_size": 8, "context": 512, "validation": 0}


def test_a_run_that_will_not_fit_is_refused_before_it_writes(tmp_path, monkeypatch):
    lm = model.load("tiny-gpt2", device="cpu")
    monkeypatch.setattr("model.room.available", lambda device: 10**6)
    monkeypatch.setattr("model.finetune.run._network", lambda *args: pytest.fail("made"))
    with pytest.raises(
        OutOfMemoryError, match=r"training will not fit.*moments.*activations.*1.0 MB are free.*recompute"
    ):
        lm.finetune(TEXTS, out=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"lora_rank": 4}, {"layers": "5"}, {"recompute": True}, {"batch_size": 4}, {"context": 256}], ids=str
)
def test_what_the_refusal_advises_takes_less(monkeypatch, options):
    lm, asked = model.load("tiny-gpt2", device="cpu"), []

    def stop(device, needs, what, remedy):
        asked.append(sum(needs.values()))
        raise OutOfMemoryError("stop")

    monkeypatch.setattr("model.room.require", stop)
    for each in ({}, options):
        with pytest.raises(OutOfMemoryError):
            lm.finetune(TEXTS, **OPTIONS | each)
    assert asked[1] < asked[0]


def test_memory_that_runs_out_on_the_way_is_one_line(tmp_path, monkeypatch, capsys):
    def run(trainer, log):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("model.finetune.train.Trainer.run", run)
    data = tmp_path / "text.txt"
    data.write_text(TEXTS[0])
    monkeypatch.setattr("sys.argv", ["gpukernels", "finetune", "--data", str(data), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "training ran out of memory" in said
    assert "were predicted" in said
    assert "Traceback" not in said
