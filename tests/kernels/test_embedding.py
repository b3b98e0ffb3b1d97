"""Embedding: one table and two, around every block, with rows that many ids read, none, or that are not there."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF, KINDS, SINGLE, check_gradients, ids
from truth import check

import gpukernels
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)

# The ids' shape, rows of the tables, columns: a program has up to 1024 of these, and 4 rows of dy at a time.
CASES = [
    ((), 1, 1, 1),
    ((3,), 5, 2, 15),
    ((4,), 1, 3, 16),
    ((5,), 2, 1, 17),
    ((2, 37), 7, 5, 40),
    ((3, 2), 4, 2, 1023),
    ((3, 2), 4, 2, 1025),
    ((0,), 3, 2, 8),
    ((2, 0), 3, 2, 8),
    ((2,), 3, 2, 0),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def arrays(kind, case, integer="int64"):
    shape, vocabulary, places, width = case
    random = np.random.default_rng(0)
    return {
        "ids": kind.ints(random.integers(0, vocabulary, shape), integer),
        "weight": kind.draw(vocabulary, width),
        "positions": kind.ints(random.integers(0, places, shape), integer),
        "position_weight": kind.draw(places, width, seed=1),
    }


@kinds
@cases
@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_forward_and_backward(kind, case, integer):
    given = arrays(kind, case, integer)
    check("embedding", given, result_dtype=kind.dtype)
    check_gradients("embedding", given)
    alone = {name: given[name] for name in ("ids", "weight")}
    check("embedding", alone, result_dtype=kind.dtype)
    check_gradients("embedding", alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    given = arrays(HALF, CASES[4])
    laid_out = given | {name: LAYOUTS[layout](given[name]) for name in ("weight", "position_weight")}
    laid_out["ids"] = given["ids"].T.contiguous().T
    laid_out["positions"] = given["positions"][:1].expand(given["positions"].shape)
    check("embedding", laid_out)
    check_gradients("embedding", laid_out, layout=layout)
    rows = {"ids": given["ids"][0], "weight": given["weight"]}  # whose dy has something between its rows, when sliced
    check_gradients("embedding", rows, layout=layout)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_result_of_another_dtype(dtype):
    for kind, other in ((SINGLE, HALF), (HALF, SINGLE)):
        given = arrays(kind, CASES[4])
        given["position_weight"] = other.draw(*given["position_weight"].shape)
        check("embedding", given, result_dtype=dtype, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_an_index_without_a_row_reads_nothing_and_adds_nothing(integer):
    outside = [2**31 - 1, -(2**31), -1, 5]
    weight, other = (SINGLE.draw(5, 20, seed=seed).requires_grad_() for seed in range(2))
    ids, places = SINGLE.ints([*outside, 3, 3], integer), SINGLE.ints([0] * 5 + [5], integer)
    y = gpukernels.embedding(ids, weight)
    assert y[:4].isnan().all()
    assert torch.equal(y[4:], weight[[3, 3]])
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    want = torch.zeros_like(weight)
    want[3] = 2
    assert torch.equal(dweight, want)
    y = gpukernels.embedding(ids, weight, positions=places, position_weight=other)
    assert y[[0, 1, 2, 3, 5]].isnan().all()
    assert torch.equal(y[4], weight[3] + other[0])


@pytest.mark.parametrize("frozen", ["weight", "position_weight"])
def test_only_the_gradients_that_are_asked_for(frozen):
    given = arrays(SINGLE, CASES[4])
    tables = ("weight", "position_weight")
    leaves = given | {name: given[name].clone().requires_grad_(name != frozen) for name in tables}
    gpukernels.embedding(**leaves).sum().backward()
    both = given | {name: given[name].clone().requires_grad_() for name in tables}
    gpukernels.embedding(**both).sum().backward()
    for name in tables:
        got = leaves[name].grad
        assert got is None if name == frozen else torch.equal(got, both[name].grad)


def test_the_same_bits_every_time_and_whatever_the_neighbours():
    given = arrays(HALF, ((2, 50), 3, 4, 40))
    runs = []
    for _ in range(2):
        leaves = given | {name: given[name].clone().requires_grad_() for name in ("weight", "position_weight")}
        y = gpukernels.embedding(**leaves)
        dy = HALF.draw(*y.shape, seed=2)
        runs.append([y, *torch.autograd.grad(y, [leaves["weight"], leaves["position_weight"]], dy)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    one = given | {name: given[name][1:, 7:8] for name in ("ids", "positions")}
    assert torch.equal(gpukernels.embedding(**one)[0, 0], runs[0][0][1, 7])


def test_a_gradient_is_summed_in_float32_and_rounded_once():
    """2048 and 32 times 1: in float16, 2048 + 1 is 2048."""
    weight = HALF.draw(2, 8).requires_grad_()
    y = gpukernels.embedding(torch.ones(33, dtype=torch.int64, device=DEVICE), weight)
    dy = torch.ones_like(y)
    dy[0] = 2048
    (dweight,) = torch.autograd.grad(y, weight, dy)
    np.testing.assert_array_equal(host(dweight), [[0] * 8, [2080] * 8])
