"""`gpukernels warmup`: no prompt or step needs a kernel that it has not compiled."""

import sys

import pytest
import torch
from decoding import lively, replayed

from model import language_model
from model.cli import main
from model.graph import GraphDecoder


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(language_model, "can_capture", lambda *arguments: True)
    monkeypatch.setattr("model.graph.CudaCapture", lambda device: replayed)


def test_steps_of_every_bucket_and_prompts_of_every_length_are_captured(capturing):
    lm = lively(torch.device("cpu"))
    assert lm.warm_up(3) > 0
    decoder = lm._idle
    assert isinstance(decoder, GraphDecoder)
    captured = set(decoder._graphs)
    assert {bucket for bucket, _ in captured} == {1, 2, 3, "prompt"}
    assert decoder.lengths == [0, 0, 0]
    lm.generate([3, 1, 4], max_new_tokens=4)
    lm.generate([[3, 1, 4], [1, 5]], max_new_tokens=4, temperature=0.7, top_p=0.9, seed=1)
    assert lm._idle is decoder
    assert set(decoder._graphs) == captured


def test_tokens_are_the_same_after_it(capturing):
    lm, warm = lively(torch.device("cpu")), lively(torch.device("cpu"))
    warm.warm_up()
    assert warm.generate([3, 1, 4], max_new_tokens=9).tokens == lm.generate([3, 1, 4], max_new_tokens=9).tokens


@pytest.fixture
def run(monkeypatch, capsys):
    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpukernels", "warmup", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return go


def test_without_a_gpu_one_line_says_so(run, monkeypatch):
    monkeypatch.setattr("model.device.why_no_cuda", lambda: "there is no NVIDIA driver on this machine")
    code, out, err = run("tiny-gpt2")
    assert (code, out) == (2, "")
    assert err == "error: device 'cuda' is not there: there is no NVIDIA driver on this machine\n"
    code, out, err = run("tiny-gpt2", "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("error: --device must be cuda or cuda:1")


def test_what_it_says(run, monkeypatch):
    monkeypatch.setattr("model.cli.warmup.load", lambda name, **options: lively(torch.device("cpu")))
    code, out, _ = run("tiny-gpt2", "--rows", "2")
    assert code == 0
    assert out.startswith("tiny-gpt2 on cpu, float32: ")
    assert "steps of up to 2 row(s)" in out
