"""A decode step moves the weights and the cache in use, and hardly anything else."""

import pytest
import torch
from kernel_cases import DEVICE
from traffic import traffic

import model
from gpukernels.compile_report.cost import cost_of
from gpukernels.kernels import device
from gpukernels.kernels.device import INTERPRETING
from model.config import GPT2Config
from model.decoder import Decoder


@pytest.mark.skipif(not INTERPRETING, reason="loads are counted by the interpreter")
def test_bytes_of_a_step(monkeypatch):
    """A layer of GPT-2's width: float16, 200 tokens in a cache of 256, launched as on an H100."""
    monkeypatch.setattr(device, "INTERPRETED", device.Gpu(capability=80, multiprocessors=132))
    held = 200
    config = GPT2Config(vocab_size=1600, n_positions=256, n_embd=768, n_layer=1, n_head=12)
    lm = model.from_config(config, device=torch.device(DEVICE), dtype="float16")
    decoder = Decoder(lm.parameters, config, rows=1, capacity=config.n_positions)
    decoder.cache.lengths[:] = held
    with traffic() as launches:
        decoder._step(1, config.n_positions, ())
    assert len(launches) == 5 + 2  # a head of few rows has the norm in its prologue

    # The table of positions is read by one row, and that of tokens as the head.
    weights = lm.parameters.nbytes - lm.parameters["positions.weight"].nbytes
    cache = 2 * 2 * held * config.n_embd
    moved = sum(each.read + each.written for each in launches)
    assert weights + cache <= moved <= 1.05 * (weights + cache)
    # What the arguments tell counts the whole capacity of the cache.
    told = sum(cost_of(each.kernel, each.arguments).moved for each in launches)
    assert moved <= told <= moved + 2 * 2 * (256 - held) * config.n_embd + 4 * 12 * 66 * 4 * 2
