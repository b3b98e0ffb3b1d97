"""What the losses and the optimizer refuse, and in which words."""

import math

import pytest
from test_op_errors import NO_FLOAT, NO_INT, makers
from test_ops import both

from gpukernels import cross_entropy, cross_entropy_with_gradient, numpy_ops, torch_ops

NO_LOGITS = "logits must be (..., V) with V of 1 or more"
TO_MATCH = "to match logits, got"

# By op: the call, where f(*shape) makes floats and i(*values) integers; the error; its message.
LOSS = [
    (lambda op, f, i: op(f(), i(1)), ValueError, f"{NO_LOGITS}, got ()"),
    (lambda op, f, i: op(f(1, 0), i(1)), ValueError, f"{NO_LOGITS}, got (1, 0)"),
    (lambda op, f, i: op(i(3), i(1)), TypeError, f"logits {NO_FLOAT}, got int32"),
    (lambda op, f, i: op(f(2, 3), f(2)), TypeError, f"targets {NO_INT}, got float32"),
    (lambda op, f, i: op(f(2, 3), i(1, 1, dtype="uint8")), TypeError, f"targets {NO_INT}, got uint8"),
    (lambda op, f, i: op(f(2, 3), i(1)), ValueError, f"targets must be (2,) {TO_MATCH} (1,)"),
    (lambda op, f, i: op(f(2, 3), i(1, 1), weights=f(2, 1)), ValueError, f"weights must be (2,) {TO_MATCH} (2, 1)"),
    (lambda op, f, i: op(f(1, 3), i(1), weights=i(1)), TypeError, f"weights {NO_FLOAT}, got int32"),
    (
        lambda op, f, i: op(f(1, 3), i(1), ignore_index=0.5),
        ValueError,
        "ignore_index must be a whole number, got 0.5",
    ),
    (
        lambda op, f, i: op(f(1, 3), i(1), ignore_index=True),
        ValueError,
        "ignore_index must be a whole number, got True",
    ),
    (lambda op, f, i: op(f(1, 3), i(1), label_smoothing=1.5), ValueError, "label_smoothing must be 0 to 1, got 1.5"),
    (lambda op, f, i: op(f(1, 3), i(1), label_smoothing=-1), ValueError, "label_smoothing must be 0 to 1, got -1"),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss=-1), ValueError, "z_loss must be 0 or more, got -1"),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss=math.nan), ValueError, "z_loss must be 0 or more, got nan"),
    (
        lambda op, f, i: op(f(1, 3), i(1), reduction="max"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'max'",
    ),
]
SCALE = [
    (
        lambda op, f, i: op(f(1, 3), i(1), scale=f(1, dtype="float64")),
        TypeError,
        "scale must be float32, got float64",
    ),
    (
        lambda op, f, i: op(f(1, 3, dtype="float64"), i(1), scale=f(1)),
        TypeError,
        "scale must be float64, got float32",
    ),
    (lambda op, f, i: op(f(1, 3), i(1), scale=f(2)), ValueError, "scale must be () or (1,), got (2,)"),
]
REFUSED = {cross_entropy: LOSS, cross_entropy_with_gradient: LOSS + SCALE}
CASES = [
    pytest.param(op, call, error, f"{op.__name__}: {message}", id=f"{op.__name__} {message}")
    for op, cases in REFUSED.items()
    for call, error, message in cases
]


@pytest.fixture
def computing_nothing(monkeypatch):
    """Whatever an op calls to compute fails."""

    def computed(*arrays, **options):
        raise AssertionError("this was computed")

    for module in (numpy_ops, torch_ops):
        for op in REFUSED:
            monkeypatch.setattr(module, op.__name__, computed)


@both
@pytest.mark.parametrize(("op", "call", "error", "message"), CASES)
@pytest.mark.usefixtures("computing_nothing")
def test_a_call_that_cannot_be_is_refused_in_words(library, op, call, error, message):
    with pytest.raises(error) as caught:
        call(op, *makers(library))
    assert type(caught.value) is error
    assert str(caught.value) == message


@both
@pytest.mark.usefixtures("computing_nothing")
def test_a_missing_array_is_refused_by_name(library):
    f, _ = makers(library)
    for op in (cross_entropy, cross_entropy_with_gradient):
        with pytest.raises(TypeError, match=f"^{op.__name__}: targets must be an array, got None"):
            op(f(2, 2), None)
