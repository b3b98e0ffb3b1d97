"""`gpukernels warmup`: no prompt or step needs a kernel that it has not compiled."""

import dataclasses
import sys

import pytest
import torch
from decoding import CONFIG, lively, replayed

from gpukernels.compile_report import record
from model import PRESETS, language_model
from model.cli import main
from model.decoder import Decoder
from model.gpt2 import slots
from model.graph import GraphDecoder
from model.parameters import Parameters
from model.warmup import PROMPTS, warm_up
from model.workloads import META

ONE_LAYER = dataclasses.replace(PRESETS["gpt2"], n_layer=1)


def binaries(lengths, capability):
    """The machine code that prompts of these lengths launch."""

    def prompts():
        parameters = Parameters(slots(ONE_LAYER), META, "float16")
        decoder = Decoder(parameters, ONE_LAYER, rows=1, capacity=ONE_LAYER.n_positions)
        for length in lengths:
            decoder.prefill(0, [0] * length)

    return {launch.compiled.cubin for launch in record(prompts, capability=capability)}


@pytest.mark.parametrize("capability", [80, 90])
def test_a_prompt_of_any_length_is_compiled(capability):
    warm = binaries(PROMPTS, capability)
    assert (
        binaries([2, 3, 5, 7, 9, 17, 31, 32, 63, 64, 66, 96, 127, 128, 129, 160, 512, 1023, 1024], capability) <= warm
    )
    assert not warm <= binaries([1024], capability)


def test_steps_of_every_bucket_are_captured(monkeypatch):
    monkeypatch.setattr(language_model, "can_capture", lambda *arguments: True)
    monkeypatch.setattr("model.graph._CudaCapture", lambda device: replayed)
    lm = lively(torch.device("cpu"))
    assert warm_up(lm, rows=3) > 0
    decoder = lm._idle
    assert isinstance(decoder, GraphDecoder)
    captured = set(decoder._graphs)
    assert {bucket for bucket, _ in captured} == {1, 2, 3}
    assert decoder.lengths == [0, 0, 0]
    lm.generate([3, 1, 4], max_new_tokens=4)
    lm.generate([[3, 1, 4], [1, 5]], max_new_tokens=4, temperature=0.7, top_p=0.9, seed=1)
    assert lm._idle is decoder
    assert set(decoder._graphs) == captured


def test_tokens_are_the_same_after_it():
    lm, warm = lively(torch.device("cpu")), lively(torch.device("cpu"))
    warm_up(warm)
    assert len([length for length in PROMPTS if length <= CONFIG.n_positions]) == 6
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
