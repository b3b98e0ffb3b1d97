"""Under `torch.autocast` products are made in its dtype, as torch's own are, and streams stay as wide as they are.

Runs where `test_registration` does.
"""

import pytest
import torch
from kernel_cases import DEVICE, SINGLE

from gpukernels import library

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

HALF = torch.float16


def on(enabled=True):
    return torch.autocast(DEVICE, dtype=HALF, enabled=enabled)


def half(*arrays):
    return [each.to(HALF) for each in arrays]


def linear(x, weight, bias, residual):
    return library.linear(x, weight, bias, activation="gelu_new", residual=residual)


def linear_by_hand(x, weight, bias, residual):
    return library.linear(*half(x, weight, bias), activation="gelu_new") + residual


def norm_linear(x, weight, bias, norm):
    return library.norm_linear(x, norm, norm, weight, bias)


def norm_linear_by_hand(x, weight, bias, norm):
    return library.linear(*half(library.layer_norm(x, norm, norm), weight, bias))


def rms_norm_linear(x, weight, norm):
    return library.norm_linear(x, norm, None, weight, norm="rms", with_x=True)[0]


def rms_norm_linear_by_hand(x, weight, norm):
    return library.linear(*half(library.rms_norm(x, norm, eps=1e-5), weight))


def attention(q, k, v):
    return library.attention(q, k, v)


def attention_by_hand(q, k, v):
    return library.attention(*half(q, k, v))


def packed_attention(qkv):
    return library.packed_attention(qkv)


def packed_attention_by_hand(qkv):
    return library.packed_attention(*half(qkv))


def matmul(a, b):
    return library.matmul(a, b)


def matmul_by_hand(a, b):
    return library.matmul(*half(a, b))


def loss(hidden, weight):
    return library.linear_cross_entropy(hidden, weight, torch.arange(len(hidden), device=DEVICE))


def loss_by_hand(hidden, weight):
    return library.linear_cross_entropy(*half(hidden, weight), torch.arange(len(hidden), device=DEVICE))


CASES = {
    "linear": (linear, linear_by_hand, [(70, 20), (24, 20), (24,), (70, 24)]),
    "linear of few rows": (linear, linear_by_hand, [(3, 20), (24, 20), (24,), (3, 24)]),
    "norm_linear": (norm_linear, norm_linear_by_hand, [(3, 20), (24, 20), (24,), (20,)]),
    "norm_linear, RMS": (rms_norm_linear, rms_norm_linear_by_hand, [(3, 20), (24, 20), (20,)]),
    "attention": (attention, attention_by_hand, [(2, 5, 2, 16)] * 3),
    "packed_attention": (packed_attention, packed_attention_by_hand, [(2, 5, 3, 2, 16)]),
    "matmul": (matmul, matmul_by_hand, [(5, 20), (20, 7)]),
    "linear_cross_entropy": (loss, loss_by_hand, [(5, 20), (30, 20)]),
}


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_as_casts_by_hand(name, gradient):
    function, by_hand, shapes = CASES[name]
    leaves = [SINGLE.draw(*shape, seed=i).requires_grad_(gradient) for i, shape in enumerate(shapes)]
    want = by_hand(*leaves)
    with on():
        found = function(*leaves)
        with on(False):
            off = function(*leaves)
    assert found.dtype == want.dtype
    assert off.dtype == torch.float32
    assert torch.equal(found, want)
    assert not torch.equal(off, want.float())
    if gradient:
        dy = torch.ones_like(want)
        pairs = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True)
        for ours, theirs in pairs:
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)


def test_64_bits_stay():
    x, weight = (SINGLE.draw(*shape).double() for shape in ((70, 20), (24, 20)))
    with on():
        assert library.matmul(x, weight.T).dtype == torch.float64


def test_compiled_whole():
    def function(x, weight):
        with on():
            return library.linear(x, weight, activation="relu", residual=x)

    x, weight = SINGLE.draw(70, 24), SINGLE.draw(24, 24)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert torch.equal(compiled(x, weight), function(x, weight))
