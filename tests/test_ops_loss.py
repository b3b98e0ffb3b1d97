"""The losses in NumPy and in plain torch against float64, torch's own losses and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, both, every_kind, numpy_kinds
from truth import Kind, check
from truth_loss import (
    OPTIONS,
    REDUCTIONS,
    check_gradient,
    check_linear,
    check_with_gradient,
    draw_tokens,
    draw_weights,
    result_dtype,
)

import gpukernels
from gpukernels.numpy_ops.blocks import BLOCK
from gpukernels.verify.compare import host

SHAPES = [(7,), (1, 1), (5, 1), (2, 3, 5), (31, 127), (0, 5), (2, 0, 5)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def arrays(kind, shape, *, weighted=True, ignored=(1, 4), spread=1.0, **tokens):
    given = {"logits": kind.draw(*shape, spread=spread)}
    given["targets"] = draw_tokens(kind, *shape[:-1], vocabulary=shape[-1], ignored=ignored, **tokens)
    return given | ({"weights": draw_weights(kind, *shape[:-1])} if weighted else {})


@every_kind
@every_shape
@every_option
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_cross_entropy(kind, shape, options, weighted):
    given = arrays(kind, shape, weighted=weighted)
    for reduction in REDUCTIONS:
        if reduction == "mean" and given["targets"].shape and 0 in shape:
            continue
        check("cross_entropy", given, result_dtype=result_dtype(kind), reduction=reduction, **options)
        check_with_gradient(given, reduction=reduction, **options)


@every_kind
def test_int32_targets_another_ignored_target_and_a_scale(kind):
    given = arrays(kind, (3, 4, 9), integer="int32", ignore_index=3)
    check("cross_entropy", given, result_dtype=result_dtype(kind), ignore_index=3)
    for scale in (0.0, 1.0, 1024.0):
        for shape in ((), (1,)):
            scales = kind._replace(dtype=result_dtype(kind)).array(np.full(shape, scale))
            check_with_gradient(given, ignore_index=3, scale=scales)


@every_kind
@pytest.mark.parametrize("rows", [BLOCK // 512 - 1, BLOCK // 512, BLOCK // 512 + 1])
def test_around_a_block_of_rows(kind, rows):
    given = arrays(kind, (rows, 512))
    check("cross_entropy", given, result_dtype=result_dtype(kind), **OPTIONS["all"])
    check_with_gradient(given, **OPTIONS["all"])


@every_kind
def test_large_logits_and_large_differences(kind):
    given = arrays(kind, (6, 40), spread=1e4)
    check("cross_entropy", given, result_dtype=result_dtype(kind), reduction="none", **OPTIONS["smoothed"])
    check_with_gradient(given, **OPTIONS["smoothed"])


@both
def test_a_loss_near_zero_keeps_its_digits(library):
    """The target's logit leads by 30: the loss is exp(-30) to within float32's unit, not that of the logit."""
    for lead in (15.0, 1000.0):
        logits = np.zeros((1, 2))
        logits[0, 1] = lead
        loss = gpukernels.cross_entropy(Kind(library, "float32").array(logits + 500), kind_ints(library, [1]))
        assert abs(float(loss) - np.log1p(np.exp(-lead))) <= 2.0**-23


def kind_ints(library, values):
    return Kind(library, "float32").ints(values, "int64")


@every_kind
def test_forbidden_words_have_logits_of_minus_infinity(kind):
    given = arrays(kind, (4, 50), ignored=())
    logits = host(given["logits"])
    logits[:, 10:40] = -np.inf
    given |= {"logits": kind.array(logits), "targets": kind.ints([0, 49, 5, 9], "int64")}
    check("cross_entropy", given, result_dtype=result_dtype(kind), z_loss=0.1)
    check_with_gradient(given, z_loss=0.1)
    given["targets"] = kind.ints([0, 49, 20, 9], "int64")
    assert np.isposinf(host(gpukernels.cross_entropy(**given, reduction="none"))).tolist() == [
        False,
        False,
        True,
        False,
    ]


@every_kind
@reductions
def test_an_ignored_token_counts_for_nothing_whatever_its_logits(kind, reduction):
    given = arrays(kind, (3, 8))
    given["logits"][1] = np.nan
    loss, dlogits = gpukernels.cross_entropy_with_gradient(**given, reduction=reduction)
    assert np.isfinite(host(loss)).all()
    assert (host(dlogits)[1] == 0).all()
    assert np.isfinite(host(dlogits)).all()


@every_kind
def test_no_tokens_at_all(kind):
    for shape, ignored in (((2, 8), (0, 1)), ((0, 8), ())):
        given = arrays(kind, shape, ignored=ignored)
        mean, dlogits = gpukernels.cross_entropy_with_gradient(**given)
        assert np.isnan(host(mean))
        assert (host(dlogits) == 0).all()
        assert host(gpukernels.cross_entropy(**given, reduction="sum")) == 0


@every_kind
@pytest.mark.parametrize("target", [-1, 8, -101, 2**40])
def test_a_target_outside_the_vocabulary(kind, target):
    given = arrays(kind, (3, 8), weighted=False) | {"targets": kind.ints([0, target, -100], "int64")}
    for op in (gpukernels.cross_entropy, gpukernels.cross_entropy_with_gradient):
        with pytest.raises(IndexError, match="arget"):
            op(**given)


@reductions
@every_option
def test_finite_differences(reduction, options):
    given = arrays(Kind("torch", "float64"), (2, 3, 7))
    logits = given.pop("logits").requires_grad_()

    def loss(x):
        return gpukernels.cross_entropy(x, **given, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("kind", KINDS[3:], ids="-".join)
@every_option
def test_gradients_of_plain_torch(kind, options):
    given = arrays(kind, (4, 3, 9))
    logits = given["logits"].requires_grad_()
    for upstream in (1.0, -3.5):
        loss = gpukernels.cross_entropy(**given, **options, reduction="sum")
        (dlogits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))
        check_gradient(dlogits, {name: host(x) for name, x in given.items()}, upstream, **options)


@both
@reductions
def test_it_is_torchs_loss(library, reduction):
    given = arrays(Kind("torch", "float32"), (6, 30), weighted=False)
    theirs = F.cross_entropy(**{"input": given["logits"], "target": given["targets"]}, reduction=reduction)
    if library == "numpy":
        given = {name: x.numpy() for name, x in given.items()}
    ours = gpukernels.cross_entropy(**given, reduction=reduction)
    np.testing.assert_allclose(host(ours), host(theirs), rtol=1e-6)


def test_no_gradient_flows_to_the_weights():
    given = arrays(Kind("torch", "float32"), (6, 30))
    given["weights"].requires_grad_()
    assert not gpukernels.cross_entropy(**given).requires_grad


@both
@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    shift=st.floats(-100, 100, width=32),
    data=st.data(),
)
def test_shifting_all_logits_changes_nothing_and_the_gradient_adds_up_to_nothing(library, logits, shift, data):
    target = data.draw(st.integers(0, len(logits) - 1))
    kind = Kind(library, "float64")
    tokens = kind_ints(library, [target])
    one, gradient = gpukernels.cross_entropy_with_gradient(kind.array([logits]), tokens, label_smoothing=0.1)
    other = gpukernels.cross_entropy(kind.array([logits]) + shift, tokens, label_smoothing=0.1)
    np.testing.assert_allclose(host(one), host(other), atol=1e-12)
    assert abs(host(gradient).sum()) <= 1e-12


def linear_arrays(kind, tokens, width, vocabulary, *, ignored=(1,)):
    given = kind.draws(hidden=(*tokens, width), weight=(vocabulary, width))
    given["targets"] = draw_tokens(kind, *tokens, vocabulary=vocabulary, ignored=ignored)
    return given | {"weights": draw_weights(kind, *tokens)}


@pytest.mark.parametrize("kind", KINDS[3:], ids="-".join)
@reductions
@every_option
def test_linear_cross_entropy(kind, reduction, options):
    for chunk in (None, 4):
        check_linear(linear_arrays(kind, (2, 3), 5, 11), reduction=reduction, chunk=chunk, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_of_torch_on_the_cpu_never_has_all_logits(reduction, monkeypatch):
    kind, largest, linear = Kind("torch", "float32"), [0], torch.nn.functional.linear

    def watched(rows, *rest):
        largest[0] = max(largest[0], len(rows))
        return linear(rows, *rest)

    given = linear_arrays(kind, (40, 30), 5, 11)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", watched)
        check_linear(given, reduction=reduction)
    assert largest[0] == 512
    for frozen in ("hidden", "weight"):
        check_linear(given, reduction=reduction, chunk=700, frozen=(frozen,))
    # Where no gradient is asked for, none is made.
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch, "mm", None)
        loss = gpukernels.linear_cross_entropy(**given | leaves, reduction=reduction)
    assert not loss.requires_grad
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    truth = gpukernels.linear_cross_entropy(**wide, reduction=reduction)
    assert abs(loss.item() - truth.item()) <= 1e-5 * abs(truth.item())
    given["targets"][3, 4] = 11
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        gpukernels.linear_cross_entropy(**given)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_the_second_derivative_of_linear_cross_entropy_is_that_of_its_parts(needed):
    """The gradients that are made beside the loss are no constants where theirs are asked for."""
    draws = Kind("torch", "float32").draws(hidden=(5, 6), weight=(9, 6)).values()
    leaves = [x.requires_grad_(need) for x, need in zip(draws, needed, strict=True)]
    targets, options = (
        torch.tensor([1, 8, -100, 0, 3]),
        {"label_smoothing": 0.1, "z_loss": 0.2, "weights": torch.rand(5)},
    )
    asked, found = [x for x in leaves if x.requires_grad], []
    for loss in (
        gpukernels.linear_cross_entropy(*leaves, targets, **options, chunk=2),
        gpukernels.cross_entropy(leaves[0] @ leaves[1].T, targets, **options),
    ):
        firsts = torch.autograd.grad(loss.square(), asked, create_graph=True)
        found.append((*firsts, *torch.autograd.grad(sum(x.square().sum() for x in firsts), asked)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)  # float32, sums of at most 54 terms around 1


def test_under_autocast_the_logits_of_linear_cross_entropy_are_narrow():
    hidden, weight = (x.requires_grad_() for x in Kind("torch", "float32").draws(hidden=(5, 6), weight=(9, 6)).values())
    targets = torch.tensor([1, 8, -100, 0, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gpukernels.linear_cross_entropy(hidden, weight, targets)
    want = gpukernels.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(loss, want)
    pairs = zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (loss, want)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", KINDS[3:], ids="-".join)
@pytest.mark.parametrize("nothing", ["ignored", "weightless"])
def test_the_gradient_of_a_mean_over_no_tokens_is_0(kind, nothing):
    given = linear_arrays(kind, (2, 3), 5, 11)
    given["targets"].fill_(-100 if nothing == "ignored" else 1)
    given["weights"].zero_()
    leaves = {name: given[name].requires_grad_() for name in ("hidden", "weight")}
    loss = gpukernels.linear_cross_entropy(**given)
    assert loss.isnan()
    (loss * 0.5).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves.values())


@numpy_kinds
@reductions
def test_linear_cross_entropy_of_numpy_is_linear_and_cross_entropy(kind, reduction):
    given = linear_arrays(kind, (2, 3), 5, 11)
    logits = gpukernels.linear(given["hidden"], given["weight"])
    tokens = {name: given[name] for name in ("targets", "weights")}
    want = gpukernels.cross_entropy(logits, **tokens, z_loss=0.1, reduction=reduction)
    found = gpukernels.linear_cross_entropy(**given, z_loss=0.1, reduction=reduction, chunk=2)
    np.testing.assert_array_equal(found, want)
