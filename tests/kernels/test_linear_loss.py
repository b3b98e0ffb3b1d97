"""Linear logits and their cross entropy, chunk by chunk, against float64; and what it keeps in memory."""

import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, HALF, SINGLE, ids
from truth_loss import OPTIONS, REDUCTIONS, check_linear, draw_tokens, draw_weights

import gpukernels
from gpukernels.kernels import linear_loss as kernels
from gpukernels.kernels import matmul
from gpukernels.kernels.device import INTERPRETING, Gpu
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def arrays(kind, tokens, width=9, vocabulary=37, *, ignored=(1, 4), weighted=True):
    given = kind.draws(hidden=(*tokens, width), weight=(vocabulary, width))
    given["targets"] = draw_tokens(kind, *tokens, vocabulary=vocabulary, ignored=ignored)
    return given | ({"weights": draw_weights(kind, *tokens)} if weighted else {})


@pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
@reductions
@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 7, None])
def test_chunks(kind, reduction, chunk):
    check_linear(arrays(kind, (2, 3)), reduction=reduction, chunk=chunk, **OPTIONS["all"])


@reductions
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_shapes(reduction, weighted):
    for tokens, width, vocabulary in (((), 1, 1), ((1,), 16, 64), ((5,), 17, 1030), ((3,), 0, 7)):
        given = arrays(HALF, tokens, width, vocabulary, ignored=(), weighted=weighted)
        check_linear(given, reduction=reduction, chunk=3)


@pytest.mark.skipif(not INTERPRETING, reason="the GPU is what it is")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(6, 64), (5, 50), (1, 50), (1, 1)])
def test_a_chunk_of_one_token_by_descriptors(tokens, vocabulary, monkeypatch):
    """A single row of logits keeps the distance to a next one that is not there."""
    monkeypatch.setattr(matmul, "gpu", lambda: Gpu(90, 3))
    check_linear(arrays(HALF, (tokens,), 16, vocabulary, ignored=()), reduction="mean", chunk=4)


def test_no_tokens():
    given = arrays(SINGLE, (0,))
    for reduction in ("sum", "none"):
        check_linear(given, reduction=reduction)
    given = arrays(SINGLE, (3,), ignored=(0, 1, 2))
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    loss = gpukernels.linear_cross_entropy(**given)
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


@reductions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, reduction):
    given = arrays(HALF, (2, 3))
    for name in ("hidden", "weight", "weights"):
        given[name] = LAYOUTS[layout](given[name])
    check_linear(given, reduction=reduction, chunk=4)


@reductions
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradients_that_are_asked_for(frozen, reduction):
    check_linear(arrays(SINGLE, (5,)), reduction=reduction, chunk=2, frozen=(frozen,))


@reductions
def test_no_gradient_where_none_is_asked_for(reduction, monkeypatch):
    given = arrays(SINGLE, (5,))
    want = gpukernels.linear_cross_entropy(**given, reduction=reduction, chunk=2)
    monkeypatch.setattr(kernels, "long_product", None)
    leaves = {name: x.requires_grad_() if name in ("hidden", "weight") else x for name, x in given.items()}
    with torch.no_grad():
        loss = gpukernels.linear_cross_entropy(**leaves, reduction=reduction, chunk=2)
    assert torch.equal(loss, want)


def test_the_graph_may_be_walked_twice():
    for reduction in REDUCTIONS:
        given = arrays(HALF, (5,))
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
        loss = gpukernels.linear_cross_entropy(**given, reduction=reduction, chunk=2)
        runs = [torch.autograd.grad(loss, leaves, torch.full_like(loss, g), retain_graph=True) for g in (1, 4, 1)]
        for first, second, third in zip(*runs, strict=True):
            assert torch.equal(first, third)
            assert not torch.equal(first, second)


def test_a_loss_scale_keeps_small_gradients():
    """A mean over many tokens of losses that are nearly 0, in float16: the scale is there before the rounding."""
    given = arrays(HALF, (4,), weighted=False, ignored=())
    leaf = given["hidden"].requires_grad_()
    loss = gpukernels.linear_cross_entropy(**given)
    small, large = (torch.autograd.grad(loss * scale, leaf, retain_graph=True)[0] for scale in (2.0**-20, 1.0))
    assert (host(small) != 0).mean() > 0.3
    assert abs(host(small) - 2.0**-20 * host(large)).max() <= 2.0**-24


def test_a_target_outside_the_vocabulary_is_nan():
    given = arrays(SINGLE, (5,), ignored=())
    given["targets"][2] = 37
    assert gpukernels.linear_cross_entropy(**given, reduction="none").isnan().tolist() == [0, 0, 1, 0, 0]
    assert gpukernels.linear_cross_entropy(**given).isnan()


@reductions
def test_all_logits_are_never_in_memory(reduction, monkeypatch):
    tokens, width, vocabulary, chunk = 64, 3, 100, 8
    given = arrays(HALF, (tokens,), width, vocabulary)
    largest, allocate = [0], torch.empty

    def empty(*shape, **options):
        x = allocate(*shape, **options)
        largest[0] = max(largest[0], x.numel() * x.element_size())
        return x

    monkeypatch.setattr(torch, "empty", empty)
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    loss = gpukernels.linear_cross_entropy(**given, reduction=reduction, chunk=chunk)
    torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert largest[0] == chunk * 128 * 2


def test_a_chunk_is_a_quarter_of_the_tokens_within_bounds():
    def rows(tokens, vocabulary, dtype=torch.bfloat16):
        return kernels.rows_at_a_time(tokens, vocabulary, dtype)

    assert [rows(tokens, 50304) for tokens in (1, 8192, 16384, 2**20)] == [2048, 2048, 4096, 8192]
    assert rows(8192, 50304, torch.float32) == 2048
    assert rows(100, 128256) == 1024
    assert rows(2**20, 2**27, torch.float32) == 128
    for vocabulary in (1, 1000, 50257, 2**18):
        for tokens in (1, 5000, 16384, 10**6):
            taken = rows(tokens, vocabulary) * vocabulary * 2
            assert taken <= max(2**28, min(2**30, tokens * vocabulary * 2 / 4))


def test_chunks_are_chosen_by_the_tokens(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 37 * 2 * 128)
    seen, losses = [], kernels.losses
    monkeypatch.setattr(kernels, "losses", lambda x, *rest, **more: (seen.append(len(x)), losses(x, *rest, **more)))
    check_linear(arrays(HALF, (600,)), reduction="sum")
    assert seen == [128] * 4 + [88]


def test_the_same_bits_every_time():
    given = arrays(HALF, (7,))
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    runs = []
    for _ in range(2):
        loss = gpukernels.linear_cross_entropy(**given, chunk=3)
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert str(runs[0][0].device).startswith(DEVICE)
