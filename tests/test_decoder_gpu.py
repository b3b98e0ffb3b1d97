"""Decoding by CUDA graphs: a captured step is the eager one, and is captured once."""

import pytest
import torch
from decoding import CONFIG, MISTRAL, REQUESTS, decoder_of, generated, lively

import model
from bench.cuda_providers import STEP_ERROR, OursPersistent, random_model
from model.persistent import PersistentDecoder
from model.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")]


@pytest.mark.parametrize("config", [CONFIG, MISTRAL], ids=["gpt2", "mistral"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_captured_step_is_the_eager_one(dtype, config):
    lm = lively(torch.device("cuda"), dtype, config=config)
    graph = decoder_of(lm, rows=3, captured=True, ahead=True)
    assert generated(graph, slots=3) == generated(decoder_of(lm, rows=3), slots=3)
    graph.warm_up()
    assert generated(graph, slots=3) == generated(decoder_of(lm, rows=3), slots=3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_a_persistent_step_is_the_eager_one(dtype, slots):
    lm = lively(torch.device("cuda"), dtype)
    ours = PersistentDecoder(lm.parameters, lm.config, rows=slots, capacity=lm.config.n_positions)
    wanted = generated(decoder_of(lm, rows=slots), slots=slots)
    for _ in range(3):  # its barrier goes on counting
        assert generated(ours, slots=slots) == wanted


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_persistent_step_of_gpt2(rows):
    """Logits beside the eager step's, then the same bits in every run: nothing is read too early."""
    lm = random_model(model.PRESETS["gpt2"], torch.device("cuda"), "float16")
    prompts = [[7 + row] * (13 * row + 20) for row in range(rows)]
    ours = OursPersistent(lm)
    assert ours.step_error(prompts) <= STEP_ERROR
    assert ours(prompts, 100) == ours(prompts, 100)


@pytest.mark.parametrize("rows", [1, 5])
def test_dependent_kernels_of_gpt2_do_not_overtake_each_other(rows):
    """Whoever read too early, or a cache that was written late, would show as other bits now and then."""
    lm = model.from_config("gpt2", device="cuda", dtype="float32")
    runs = []
    for captured in (True, True, False):
        decoder = decoder_of(lm, rows=rows, captured=captured)
        tokens = [decoder.start(row, [7 + row] * (90 * row + 20), Sampling())() for row in range(rows)]
        tokens += [decoder.step(rows)() for _ in range(300)]
        runs.append((tokens, decoder.cache.keys.cpu(), decoder.cache.values.cpu()))
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for again, atol in ((runs[1], 0), (runs[2], 1e-3)):
        for array, other in zip(runs[0][1:], again[1:], strict=True):
            torch.testing.assert_close(array, other, rtol=0, atol=atol)


def test_generate_keeps_its_graphs():
    lm = lively("cuda")
    prompts = [prompt for prompt, *_ in REQUESTS]
    first = [result.tokens for result in lm.generate(prompts, max_new_tokens=8, batch_size=4)]
    graphs = dict(lm._idle._graphs)
    assert [result.tokens for result in lm.generate(prompts, max_new_tokens=8, batch_size=2)] == [*first]
    assert set(graphs) <= set(lm._idle._graphs)


def test_after_a_warm_up_nothing_is_captured():
    lm = lively("cuda")
    assert lm.warm_up(4) > 0
    graphs = dict(lm._idle._graphs)
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        lm.generate([prompt for prompt, *_ in REQUESTS], max_new_tokens=8, batch_size=4, **options)
    assert lm._idle._graphs == graphs
