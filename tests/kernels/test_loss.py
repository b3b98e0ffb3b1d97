"""Cross entropy: every path by vocabulary, every dtype, against float64."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF, KINDS, SINGLE, ids
from truth import check
from truth_loss import (
    OPTIONS,
    REDUCTIONS,
    check_gradient,
    check_with_gradient,
    draw_tokens,
    draw_weights,
    true_divisor,
)

import gpukernels
from gpukernels.kernels import loss as kernels
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))

# A row at once up to 1024 and 4096 logits, then in pieces of 8192.
SHAPES = [(1, 1), (7,), (2, 3, 5), (3, 1023), (2, 1024), (2, 1025), (2, 4096), (2, 4097), (0, 5), (2, 0, 5)]
LARGE = [(3, 8191), (2, 8192), (2, 8193), (2, 16384), (2, 20011)]


def arrays(kind, shape, *, weighted=True, ignored=(1, 4), spread=1.0, **tokens):
    given = {"logits": kind.draw(*shape, spread=spread)}
    given["targets"] = draw_tokens(kind, *shape[:-1], vocabulary=shape[-1], ignored=ignored, **tokens)
    return given | ({"weights": draw_weights(kind, *shape[:-1])} if weighted else {})


def check_backward(given, *, reduction="mean", layout="contiguous", **options):
    """autograd's gradient, with an upstream gradient that is not 1."""
    before = {name: host(x) for name, x in given.items()}
    logits = given["logits"].detach().requires_grad_()
    loss = gpukernels.cross_entropy(**given | {"logits": logits}, reduction=reduction, **options)
    dloss = SINGLE.draw(*loss.shape, seed=100)
    upstream = host(dloss)
    dloss = LAYOUTS[layout](dloss) if dloss.ndim > 1 else dloss
    (dlogits,) = torch.autograd.grad(loss, logits, dloss)
    np.testing.assert_array_equal(host(dloss), upstream)
    if reduction == "mean":
        upstream = upstream / true_divisor(before["targets"], before.get("weights"), options.get("ignore_index", -100))
    assert dlogits.dtype == given["logits"].dtype
    check_gradient(dlogits, before, upstream, **options)


def check_all(given, **options):
    check("cross_entropy", given, result_dtype="float32", **options)
    check_with_gradient(given, **options)
    check_backward(given, **options)


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_shapes(kind, shape, weighted):
    given = arrays(kind, shape, weighted=weighted)
    for reduction in ("sum", "none") if not weighted or 0 in shape else ("mean",):
        check_all(given, reduction=reduction)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_rows_in_pieces(shape):
    check_all(arrays(HALF, shape), **OPTIONS["all"])
    check_all(arrays(SINGLE, shape), reduction="sum")


@kinds
@every_option
def test_options(kind, options):
    given = arrays(kind, (2, 2, 41), ignored=(1,), integer="int32", ignore_index=3)
    for reduction in REDUCTIONS if kind is HALF else ("mean",):
        check_all(given, ignore_index=3, reduction=reduction, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    given = arrays(HALF, (2, 3, 40))
    given |= {name: LAYOUTS[layout](given[name]) for name in ("logits", "weights")}
    if layout != "contiguous":
        given["targets"] = torch.stack([given["targets"], torch.full_like(given["targets"], -1)], -1)[..., 0]
    check("cross_entropy", given, result_dtype="float32", reduction="none", z_loss=0.1)
    check_with_gradient(given, reduction="none", z_loss=0.1)
    check_backward(given, reduction="none", z_loss=0.1, layout=layout)


@kinds
@pytest.mark.parametrize("vocabulary", [57, 9001])
def test_a_padded_vocabulary(kind, vocabulary):
    """The padding may hold anything, is not read, and gets no gradient."""
    padded = -(-vocabulary // 64) * 64
    store = torch.full((2, 3, padded), torch.nan, dtype=getattr(torch, kind.dtype), device=DEVICE)
    store[..., :vocabulary] = kind.draw(2, 3, vocabulary)
    given = arrays(kind, (2, 3, vocabulary)) | {"logits": store[..., :vocabulary]}
    check_all(given, **OPTIONS["smoothed"])
    leaf = store.clone().requires_grad_()
    gpukernels.cross_entropy(**given | {"logits": leaf[..., :vocabulary]}).backward()
    assert (leaf.grad[..., vocabulary:] == 0).all()


@pytest.mark.parametrize("tokens", [4095, 4097])
def test_more_tokens_than_one_step_of_a_sum(tokens):
    given = arrays(SINGLE, (tokens, 3), ignored=range(0, tokens, 3))
    divisor = kernels.divisor_of(given["targets"], given["weights"], -100)
    total = kernels.total_of(given["weights"], divisor)
    weights, kept = host(given["weights"]), host(given["targets"]) != -100
    np.testing.assert_allclose(host(divisor), [weights[kept].sum()], rtol=1e-6)
    np.testing.assert_allclose(host(total), weights.sum() / weights[kept].sum(), rtol=1e-6)
    assert host(kernels.divisor_of(given["targets"], None, -100)) == kept.sum()


def test_large_logits_and_large_differences():
    for given in (arrays(HALF, (4, 70), spread=2e4), arrays(SINGLE, (4, 1500), spread=1e4)):
        given["logits"].clamp_(-6e4, 6e4)
        check_all(given, **OPTIONS["smoothed"])


def test_a_loss_near_zero_keeps_its_digits():
    logits = torch.zeros((1, 2), device=DEVICE) + 500
    logits[0, 1] += 15
    loss = gpukernels.cross_entropy(logits, SINGLE.ints([1]))
    assert abs(loss.item() - np.log1p(np.exp(-15.0))) <= 2.0**-22


@kinds
def test_forbidden_words_have_logits_of_minus_infinity(kind):
    given = arrays(kind, (4, 3000), ignored=())
    given["logits"][:, :2000] = -torch.inf
    given["targets"] = kind.ints([2000, 2999, 2500, 2001], "int64")
    check_all(given, z_loss=0.1)
    given["targets"][2] = 5
    losses = gpukernels.cross_entropy(**given, reduction="none")
    assert torch.isposinf(losses).tolist() == [False, False, True, False]


def test_nothing_but_forbidden_words_or_an_infinite_logit_is_nan():
    for value in (-torch.inf, torch.inf, torch.nan):
        logits = torch.zeros((2, 9), device=DEVICE)
        logits[1, :] = value
        loss, dlogits = gpukernels.cross_entropy_with_gradient(logits, SINGLE.ints([1, 1]), reduction="none")
        assert loss.isnan().tolist() == [False, True]
        assert dlogits.isnan().any(1).tolist() == [False, True]


def test_an_ignored_token_counts_for_nothing_whatever_its_logits():
    given = arrays(HALF, (3, 9000), ignored=(1,))
    given["logits"][1] = torch.nan
    loss, dlogits = gpukernels.cross_entropy_with_gradient(**given)
    assert loss.isfinite()
    assert (dlogits[1] == 0).all()
    logits = given["logits"].requires_grad_()
    (other,) = torch.autograd.grad(gpukernels.cross_entropy(**given), logits)
    assert (other[1] == 0).all()
    assert dlogits.isfinite().all()
    assert other.isfinite().all()


@pytest.mark.parametrize("target", [-1, 40, -101, 2**40])
def test_a_target_outside_the_vocabulary_is_nan_and_is_not_read(target):
    given = arrays(SINGLE, (3, 40), weighted=False) | {"targets": SINGLE.ints([0, target, -100], "int64")}
    loss, dlogits = gpukernels.cross_entropy_with_gradient(**given, reduction="none")
    logits = given["logits"].requires_grad_()
    other = gpukernels.cross_entropy(**given, reduction="none")
    (other_gradient,) = torch.autograd.grad(other.sum(), logits)
    for losses, gradient in ((loss, dlogits), (other, other_gradient)):
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False]
        assert not gradient[[0, 2]].isnan().any()


def test_the_mean_over_no_tokens_is_nan_and_has_no_gradient():
    for shape, ignored in (((2, 8), (0, 1)), ((0, 8), ())):
        given = arrays(SINGLE, shape, ignored=ignored)
        loss, dlogits = gpukernels.cross_entropy_with_gradient(**given)
        assert loss.isnan()
        assert (dlogits == 0).all()
        assert gpukernels.cross_entropy(**given, reduction="sum") == 0


@kinds
def test_a_scale_is_multiplied_in_before_the_rounding(kind):
    given = arrays(kind, (4, 30))
    for shape in ((), (1,)):
        check_with_gradient(given, scale=torch.full(shape, 3e-5, device=DEVICE))
        check_with_gradient(given, scale=torch.full(shape, 1024.0, device=DEVICE), reduction="none")


def test_the_gradient_over_the_logits_is_the_gradient_beside_them():
    for kind, vocabulary in ((HALF, 50), (HALF, 8200), (SINGLE, 8200)):
        given = arrays(kind, (3, vocabulary))
        _, dlogits = gpukernels.cross_entropy_with_gradient(**given, reduction="sum")
        loss = torch.empty(3, device=DEVICE)
        x = given["logits"]
        kernels.losses(x, given["targets"], given["weights"], -100, 0.0, 0.0, loss=loss, dx=x)
        assert torch.equal(x, dlogits)


def test_the_graph_may_be_walked_twice():
    given = arrays(HALF, (3, 30))
    logits = given["logits"].requires_grad_()
    loss = gpukernels.cross_entropy(**given)
    runs = [torch.autograd.grad(loss, logits, torch.full_like(loss, g), retain_graph=True)[0] for g in (1, 4, 1)]
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(4 * runs[0].float(), runs[1].float())


def test_the_same_bits_every_time_and_whatever_the_neighbours():
    given = arrays(HALF, (5, 9000), ignored=(1,))
    runs = [gpukernels.cross_entropy_with_gradient(**given, reduction="none") for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    alone = gpukernels.cross_entropy_with_gradient(**{name: x[2:3] for name, x in given.items()}, reduction="none")
    assert all(torch.equal(one[0], all_[2]) for one, all_ in zip(alone, runs[0], strict=True))


def test_rows_of_the_gradient_start_where_16_byte_accesses_may():
    for vocabulary in (1, 50, 64, 65):
        given = arrays(HALF, (2, 3, vocabulary))
        _, dlogits = gpukernels.cross_entropy_with_gradient(**given)
        assert dlogits.stride(1) % 64 == 0
