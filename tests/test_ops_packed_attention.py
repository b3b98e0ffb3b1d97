"""`packed_attention` in NumPy and in plain torch: as `attention` of its thirds, gradient and all."""

import numpy as np
import pytest
import torch
from kinds import both, every_kind
from refusals import NO_FLOAT, NO_INT, makers, refuses
from truth import Kind, check

from gpukernels import attention, packed_attention
from gpukernels.verify.compare import host

OPTIONS = {
    "causal": {},
    "all see all": {"causal": False},
    "window": {"window": 3},
    "scale": {"scale": 0.7},
    "documents": {"documents": [[3, 3, 0, 3, 3, 3, 1], [1] * 7]},
}


@every_kind
@pytest.mark.parametrize("case", OPTIONS)
def test_it_is_attention_of_its_thirds(kind, case):
    options = dict(OPTIONS[case])
    integers = {name: kind.ints(options.pop(name)) for name in ("documents",) if name in options}
    for shape in ((2, 7, 3, 3, 8), (2, 7, 3, 1, 5)):
        qkv = kind.draw(*shape)
        check("packed_attention", {"qkv": qkv, **integers}, **options)
        thirds = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **integers, **options)
        np.testing.assert_array_equal(host(packed_attention(qkv, **integers, **options)), host(thirds))


@every_kind
def test_a_window_as_wide_as_all_keys_is_none(kind):
    """Bit for bit: plain torch has a quicker way there, which stores no scores."""
    qkv = kind.draw(2, 7, 3, 3, 8)
    for window in (7, 4096):
        np.testing.assert_array_equal(host(packed_attention(qkv, window=window)), host(packed_attention(qkv)))
        q, k, v = (qkv[:, :, part] for part in range(3))
        np.testing.assert_array_equal(host(attention(q, k, v, window=window)), host(attention(q, k, v)))


@every_kind
@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8)])
def test_nothing(kind, shape):
    assert tuple(packed_attention(kind.draw(*shape)).shape) == (*shape[:2], *shape[3:])


def test_the_gradient_is_that_of_the_thirds_joined():
    qkv = Kind("torch", "float64").draw(2, 7, 3, 3, 8).requires_grad_()
    dout = torch.ones(2, 7, 3, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad(packed_attention(qkv), qkv, dout)
    (wanted,) = torch.autograd.grad(attention(*qkv.unbind(2)), qkv, dout)
    assert torch.equal(found, wanted)


WANTED = "qkv must be (B, T, 3, H, D) with H and D of 1 or more"
REFUSED = [
    (lambda f, i: {"qkv": f(2, 5, 2, 8)}, ValueError, f"{WANTED}, got (2, 5, 2, 8)"),
    (lambda f, i: {"qkv": f(2, 5, 2, 2, 8)}, ValueError, f"{WANTED}, got (2, 5, 2, 2, 8)"),
    (lambda f, i: {"qkv": f(2, 5, 3, 0, 8)}, ValueError, f"{WANTED}, got (2, 5, 3, 0, 8)"),
    (lambda f, i: {"qkv": f(2, 5, 3, 2, 0)}, ValueError, f"{WANTED}, got (2, 5, 3, 2, 0)"),
    (lambda f, i: {"qkv": i(1)}, TypeError, f"qkv {NO_FLOAT}, got int32"),
    (lambda f, i: {"qkv": None}, TypeError, "qkv must be an array, got None"),
    (lambda f, i: {"window": 0}, ValueError, "window must be a whole number, 1 or more, got 0"),
    (lambda f, i: {"window": 2, "causal": False}, ValueError, "window needs causal=True"),
    (lambda f, i: {"scale": 0.0}, ValueError, "scale must be a number above 0, got 0.0"),
    (lambda f, i: {"documents": f(2, 5)}, TypeError, f"documents {NO_INT}, got float32"),
    (
        lambda f, i: {"documents": i(5)},
        ValueError,
        "documents must be (2, 5) one number for each key, got (1,)",
    ),
]


@both
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
@pytest.mark.usefixtures("computing_nothing")
def test_a_call_that_cannot_be_is_refused_in_words(library, call, error, message):
    f, i = makers(library)
    refuses(lambda: packed_attention(**{"qkv": f(2, 5, 3, 2, 8)} | call(f, i)), error, f"packed_attention: {message}")
