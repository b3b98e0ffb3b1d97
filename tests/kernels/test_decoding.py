"""A model decodes by the fused kernels, token for token as on NumPy."""

import functools

import pytest
import torch
from decoding import CONFIG, MISTRAL, REQUESTS, check_a_row_that_is_not_finite, decoder_of, generated, lively
from kernel_cases import DEVICE

import gpukernels
from gpukernels import torch_ops


@pytest.fixture(scope="module")
def expected():
    return functools.cache(lambda config: generated(decoder_of(lively("cpu", config=config), rows=1), slots=1))


@pytest.fixture
def kernels_only(monkeypatch):
    for name in set(gpukernels.__all__) & set(vars(torch_ops)):
        monkeypatch.setattr(torch_ops, name, lambda *args, **options: pytest.fail("plain torch ran"))


# Alone: a long prompt with top-k, and greedily with a penalty.
@pytest.mark.parametrize(
    ("config", "slots", "captured", "only"),
    [(CONFIG, 1, False, [2, 3]), (CONFIG, 3, True, range(len(REQUESTS))), (MISTRAL, 2, True, [0, 1, 2, 3])],
    ids=["one by one", "joining and leaving", "mistral"],
)
def test_tokens_are_those_of_numpy(expected, config, slots, captured, only, kernels_only):
    decoder = decoder_of(lively(torch.device(DEVICE), config=config), rows=slots, captured=captured, ahead=captured)
    assert generated(decoder, slots=slots, only=only) == [expected(config)[each] for each in only]


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(kernels_only):
    check_a_row_that_is_not_finite(lively(torch.device(DEVICE)), captured=True)
