"""What the losses and the optimizer refuse, and in which words."""

import math

import pytest
from kinds import both
from refusals import NO_FLOAT, NO_INT, makers, refuses

from gpukernels import adamw, cross_entropy, cross_entropy_with_gradient, linear_cross_entropy

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
        "ignore_index must be a whole number of up to 64 bits, got 0.5",
    ),
    (
        lambda op, f, i: op(f(1, 3), i(1), ignore_index=True),
        ValueError,
        "ignore_index must be a whole number of up to 64 bits, got True",
    ),
    (
        lambda op, f, i: op(f(1, 3), i(1), ignore_index=2**63),
        ValueError,
        "ignore_index must be a whole number of up to 64 bits, got 9223372036854775808",
    ),
    (
        lambda op, f, i: op(f(1, 3), i(1), label_smoothing=1.5),
        ValueError,
        "label_smoothing must be a number, 0 to 1, got 1.5",
    ),
    (
        lambda op, f, i: op(f(1, 3), i(1), label_smoothing=-1),
        ValueError,
        "label_smoothing must be a number, 0 to 1, got -1",
    ),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss=-1), ValueError, "z_loss must be a number, 0 or more, got -1"),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss=math.inf), ValueError, "z_loss must be a number, 0 or more, got inf"),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss="a"), ValueError, "z_loss must be a number, 0 or more, got 'a'"),
    (lambda op, f, i: op(f(1, 3), i(1), z_loss=math.nan), ValueError, "z_loss must be a number, 0 or more, got nan"),
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


def state(f, i, *, parameter=None, **changed):
    parameter = f(3) if parameter is None else parameter
    arrays = {"parameter": parameter, "gradient": f(3), "first_moment": f(3), "second_moment": f(3)}
    return arrays | {"step": i(1), "learning_rate": f(1)} | changed


ADAMW = [
    (lambda op, f, i: op(**state(f, i, parameter=f(3, 1))), ValueError, "parameter must be (N,), got (3, 1)"),
    (lambda op, f, i: op(**state(f, i, parameter=i(3))), TypeError, f"parameter {NO_FLOAT}, got int32"),
    (lambda op, f, i: op(**state(f, i, gradient=i(3))), TypeError, f"gradient {NO_FLOAT}, got int32"),
    (lambda op, f, i: op(**state(f, i, step=f(1))), TypeError, f"step {NO_INT}, got float32"),
    (lambda op, f, i: op(**state(f, i, step=i(1, 2))), ValueError, "step must be () or (1,), got (2,)"),
    (
        lambda op, f, i: op(**state(f, i, parameter=f(3, dtype="float16"))),
        TypeError,
        "master must be a float32 array for a float16 parameter, got None",
    ),
    (
        lambda op, f, i: op(**state(f, i, master=f(3))),
        TypeError,
        "master must be None for a float32 parameter, got an array",
    ),
    (
        lambda op, f, i: op(**state(f, i, parameter=f(3, dtype="float16"), master=f(3, dtype="float16"))),
        TypeError,
        "master must be float32, got float16",
    ),
    (
        lambda op, f, i: op(**state(f, i, first_moment=f(3, dtype="float16"))),
        TypeError,
        "first_moment must be float32, got float16",
    ),
    (
        lambda op, f, i: op(**state(f, i, parameter=f(3, dtype="float64"), first_moment=f(3, dtype="float64"))),
        TypeError,
        "second_moment must be float64, got float32",
    ),
    (
        lambda op, f, i: op(**state(f, i, learning_rate=f(1, dtype="float16"))),
        TypeError,
        "learning_rate must be float32, got float16",
    ),
    (
        lambda op, f, i: op(**state(f, i, learning_rate=f(3))),
        ValueError,
        "learning_rate must be () or (1,), got (3,)",
    ),
    (
        lambda op, f, i: op(**state(f, i, gradient_scale=f(3))),
        ValueError,
        "gradient_scale must be () or (1,), got (3,)",
    ),
    *(
        (
            lambda op, f, i, name=name: op(**state(f, i, **{name: f(4)})),
            ValueError,
            f"{name} must be (3,) to match parameter, got (4,)",
        )
        for name in ("gradient", "first_moment", "second_moment")
    ),
    *(
        (
            lambda op, f, i, name=name: op(**state(f, i, **{name: f(6)[::2]})),
            ValueError,
            f"{name} must be contiguous, got a strided view",
        )
        for name in ("parameter", "first_moment", "second_moment")
    ),
    *(
        (
            lambda op, f, i, betas=betas: op(**state(f, i), betas=betas),
            ValueError,
            f"betas must be two numbers from 0 to less than 1, got {betas}",
        )
        for betas in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), 0.9, None, (0.9, None))
    ),
    (lambda op, f, i: op(**state(f, i), eps=-1), ValueError, "eps must be a number, 0 or more, got -1"),
    (
        lambda op, f, i: op(**state(f, i), weight_decay=math.nan),
        ValueError,
        "weight_decay must be a number, 0 or more, got nan",
    ),
    *(
        (
            lambda op, f, i, decayed=decayed: op(**state(f, i), decayed=decayed),
            ValueError,
            f"decayed must be a whole number, 0 to 3, or None, got {decayed}",
        )
        for decayed in (-1, 4, 1.5)
    ),
]
LINEAR = [
    (lambda op, f, i: op(f(2, 3), f(3), i(1, 1)), ValueError, "weight must be (V, C) with V of 1 or more, got (3,)"),
    (
        lambda op, f, i: op(f(2, 3), f(0, 3), i(1, 1)),
        ValueError,
        "weight must be (V, C) with V of 1 or more, got (0, 3)",
    ),
    (
        lambda op, f, i: op(f(2, 4), f(5, 3), i(1, 1)),
        ValueError,
        "hidden must be (..., 3) to match weight (5, 3), got (2, 4)",
    ),
    (lambda op, f, i: op(f(), f(5, 3), i(1)), ValueError, "hidden must be (..., 3) to match weight (5, 3), got ()"),
    (
        lambda op, f, i: op(f(2, 3), f(5, 3, dtype="float16"), i(1, 1)),
        TypeError,
        "weight must have hidden's dtype float32, got float16",
    ),
    (lambda op, f, i: op(i(3), f(5, 3), i(1)), TypeError, f"hidden {NO_FLOAT}, got int32"),
    (lambda op, f, i: op(f(2, 3), i(3), i(1)), TypeError, f"weight {NO_FLOAT}, got int32"),
    (lambda op, f, i: op(f(2, 3), f(5, 3), f(2)), TypeError, f"targets {NO_INT}, got float32"),
    (lambda op, f, i: op(f(2, 3), f(5, 3), i(1)), ValueError, "targets must be (2,) to match hidden, got (1,)"),
    (
        lambda op, f, i: op(f(1, 3), f(5, 3), i(1), weights=f(2)),
        ValueError,
        "weights must be (1,) to match hidden, got (2,)",
    ),
    (
        lambda op, f, i: op(f(1, 3), f(5, 3), i(1), reduction="max"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'max'",
    ),
    *(
        (
            lambda op, f, i, chunk=chunk: op(f(1, 3), f(5, 3), i(1), chunk=chunk),
            ValueError,
            f"chunk must be a whole number, 1 or more, or None, got {chunk}",
        )
        for chunk in (0, 1.5)
    ),
]
REFUSED = {linear_cross_entropy: LINEAR, cross_entropy: LOSS, cross_entropy_with_gradient: LOSS + SCALE, adamw: ADAMW}
CASES = [
    pytest.param(op, call, error, f"{op.__name__}: {message}", id=f"{op.__name__} {message}")
    for op, cases in REFUSED.items()
    for call, error, message in cases
]


@both
@pytest.mark.parametrize(("op", "call", "error", "message"), CASES)
@pytest.mark.usefixtures("computing_nothing")
def test_a_call_that_cannot_be_is_refused_in_words(library, op, call, error, message):
    refuses(lambda: call(op, *makers(library)), error, message)


@both
@pytest.mark.usefixtures("computing_nothing")
def test_a_missing_array_is_refused_by_name(library):
    f, _ = makers(library)
    for op in (cross_entropy, cross_entropy_with_gradient):
        with pytest.raises(TypeError, match=f"^{op.__name__}: targets must be an array, got None"):
            op(f(2, 2), None)
