"""A model decodes by the fused kernels, token for token as on NumPy; on a GPU, captured as well as one by one."""

import pytest
import torch
from decoding import REQUESTS, check_a_row_that_is_not_finite, decoder_of, generated, lively
from kernel_cases import DEVICE

import gpukernels
from gpukernels import torch_ops
from gpukernels.kernels.device import INTERPRETING
from model.graph import GraphDecoder


@pytest.fixture(scope="module")
def expected():
    return generated(decoder_of(lively("cpu"), rows=1), slots=1)


@pytest.fixture
def kernels_only(monkeypatch):
    for name in set(gpukernels.__all__) & set(vars(torch_ops)):
        monkeypatch.setattr(torch_ops, name, lambda *args, **options: pytest.fail("plain torch ran"))


# Alone: a long prompt with top-k, and greedily with a penalty.
@pytest.mark.parametrize(
    ("slots", "captured", "only"),
    [(1, False, [2, 3]), (3, True, range(len(REQUESTS)))],
    ids=["one by one", "joining and leaving"],
)
def test_tokens_are_those_of_numpy(expected, slots, captured, only, kernels_only):
    lm = lively(torch.device(DEVICE))
    if INTERPRETING:
        decoder = decoder_of(lm, rows=slots, captured=captured, ahead=captured)
    else:
        kind = GraphDecoder if captured else type(decoder_of(lm, rows=1))
        decoder = kind(lm.parameters, lm.config, rows=slots, capacity=lm.config.n_positions)
    assert generated(decoder, slots=slots, only=only) == [expected[each] for each in only]


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(kernels_only):
    check_a_row_that_is_not_finite(lively(torch.device(DEVICE)), captured=INTERPRETING)


@pytest.mark.skipif(INTERPRETING, reason="graphs are CUDA's")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_captured_step_is_the_eager_one(dtype):
    lm = lively(torch.device(DEVICE), dtype)
    options = {"rows": 3, "capacity": lm.config.n_positions}
    graph = GraphDecoder(lm.parameters, lm.config, **options)
    assert generated(graph, slots=3) == generated(decoder_of(lm, rows=3), slots=3)
    graph.warm_up()
    assert generated(graph, slots=3) == generated(decoder_of(lm, rows=3), slots=3)


@pytest.mark.skipif(INTERPRETING, reason="a model on CUDA keeps its graphs")
def test_generate_keeps_its_graphs():
    lm = lively("cuda")
    prompts = [prompt for prompt, *_ in REQUESTS]
    first = [result.tokens for result in lm.generate(prompts, max_new_tokens=8, batch_size=4)]
    graphs = dict(lm._idle._graphs)
    assert [result.tokens for result in lm.generate(prompts, max_new_tokens=8, batch_size=2)] == [*first]
    assert set(graphs) <= set(lm._idle._graphs)


@pytest.mark.skipif(INTERPRETING, reason="graphs are CUDA's")
def test_after_a_warm_up_nothing_is_captured():
    lm = lively("cuda")
    assert lm.warm_up(4) > 0
    graphs = dict(lm._idle._graphs)
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        lm.generate([prompt for prompt, *_ in REQUESTS], max_new_tokens=8, batch_size=4, **options)
    assert lm._idle._graphs == graphs
