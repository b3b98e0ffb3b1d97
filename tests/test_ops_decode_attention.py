"""`decode_attention` in NumPy and in plain torch: against the float64 truth, and as `attention` of one query."""

import numpy as np
import pytest
import torch
from kinds import both, every_kind
from refusals import makers, refuses
from truth import Kind, check

import gpukernels
from gpukernels import attention, decode_attention
from gpukernels.verify.compare import host

CASES = {
    "one head": ((1, 1, 4), (5, 1), [5], {}),
    "rows of every length": ((6, 2, 8), (9, 2), [0, 1, 2, 5, 8, 9], {}),
    "grouped heads": ((3, 6, 4), (8, 2), [8, 3, 0], {}),
    "one key head": ((3, 4, 5), (7, 1), [7, 6, 1], {}),
    "window of one": ((3, 2, 4), (7, 2), [7, 1, 0], {"window": 1}),
    "window": ((4, 2, 4), (12, 1), [12, 5, 4, 3], {"window": 4}),
    "scale": ((2, 2, 4), (6, 2), [6, 2], {"scale": 0.3}),
    "no rows": ((0, 2, 4), (6, 2), [], {}),
    "no keys": ((2, 2, 4), (0, 2), [0, 0], {}),
}


def arrays(kind, shape, kv, lengths, integer="int32"):
    batch, _, width = shape
    given = kind.draws(q=shape, k=(batch, *kv, width), v=(batch, *kv, width))
    return given | {"lengths": kind.ints(np.array(lengths, np.int64), integer)}


@every_kind
@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kind, integer, case):
    shape, kv, lengths, options = CASES[case]
    check("decode_attention", arrays(kind, shape, kv, lengths, integer), **options)


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_of_one_query(kind, case):
    shape, kv, lengths, options = CASES[case]
    given = arrays(kind, shape, kv, lengths)
    whole = attention(given["q"][:, None], given["k"], given["v"], lengths=given["lengths"], **options)
    np.testing.assert_array_equal(host(decode_attention(**given, **options)), host(whole[:, 0]))


@every_kind
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_lies_past_a_rows_length_is_not_read(kind, garbage):
    lengths = [0, 1, 3, 6]
    given = arrays(kind, (4, 2, 4), (8, 2), lengths)
    clean = host(decode_attention(**given))
    for row, length in enumerate(lengths):
        given["k"][row, length:] = given["v"][row, length:] = garbage
    np.testing.assert_array_equal(host(decode_attention(**given)), clean)
    assert (clean[0] == 0).all()
    assert (clean[1:] != 0).all()


@every_kind
def test_a_cache_that_is_stored_by_head(kind):
    given = arrays(kind, (3, 4, 8), (7, 2), [7, 4, 0])
    stored = {name: given[name].swapaxes(1, 2) for name in ("k", "v")}
    stored = {
        name: (np.ascontiguousarray(x) if kind.arrays == "numpy" else x.contiguous()) for name, x in stored.items()
    }
    check("decode_attention", given | {name: x.swapaxes(1, 2) for name, x in stored.items()})


def qkv(f, *, q=(2, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8)):
    return {"q": f(*q), "k": f(*k), "v": f(*v)}


NO_HEADS = "q must be (B, H, D) with H of 1 or more and D of 1 to 256"
NO_FLOAT, NO_INT = "must be a floating-point array", "must be int32 or int64"
REFUSED = [
    (lambda f, i: (qkv(f, q=(2, 1, 4, 8)), i(5, 5)), ValueError, f"{NO_HEADS}, got (2, 1, 4, 8)"),
    (lambda f, i: (qkv(f, q=(2, 0, 8)), i(5, 5)), ValueError, f"{NO_HEADS}, got (2, 0, 8)"),
    (lambda f, i: (qkv(f, q=(2, 4, 257)), i(5, 5)), ValueError, f"{NO_HEADS}, got (2, 4, 257)"),
    (lambda f, i: (qkv(f, k=(2, 5, 8)), i(5, 5)), ValueError, "k must be (2, S, Hkv, 8) to match q, got (2, 5, 8)"),
    (
        lambda f, i: (qkv(f, k=(2, 5, 2, 4)), i(5, 5)),
        ValueError,
        "k must be (2, S, Hkv, 8) to match q, got (2, 5, 2, 4)",
    ),
    (lambda f, i: (qkv(f, k=(2, 5, 3, 8)), i(5, 5)), ValueError, "k's heads must divide the 4 heads of q, got 3"),
    (
        lambda f, i: (qkv(f, v=(2, 6, 2, 8)), i(5, 5)),
        ValueError,
        "v must be (2, 5, 2, 8) to match k, got (2, 6, 2, 8)",
    ),
    (
        lambda f, i: (qkv(f) | {"k": f(2, 5, 2, 8, dtype="float16")}, i(5, 5)),
        TypeError,
        "k must have q's dtype float32, got float16",
    ),
    (lambda f, i: (qkv(f) | {"q": i(1)}, i(5, 5)), TypeError, f"q {NO_FLOAT}, got int32"),
    (lambda f, i: (qkv(f), i(5)), ValueError, "lengths must be (2,) one length for each row, got (1,)"),
    (lambda f, i: (qkv(f), f(2)), TypeError, f"lengths {NO_INT}, got float32"),
    (
        lambda f, i: (qkv(f) | {"window": 0}, i(5, 5)),
        ValueError,
        "window must be a whole number, 1 or more, got 0",
    ),
]


@both
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_call_that_cannot_be_is_refused_in_words(library, call, error, message):
    given, lengths = call(*makers(library))
    refuses(lambda: decode_attention(**given, lengths=lengths), error, f"decode_attention: {message}")


def test_numpy_checks_lengths_by_value():
    f, i = makers("numpy")
    for lengths, got in (((5, -1), "-1 to 5"), ((6, 3), "3 to 6")):
        with pytest.raises(ValueError, match="lengths") as caught:
            decode_attention(**qkv(f), lengths=i(*lengths))
        assert str(caught.value) == f"decode_attention: lengths must be 0 to 5, got {got}"


@both
def test_a_missing_array_is_refused_by_name(library):
    f, _ = makers(library)
    with pytest.raises(TypeError, match=r"^decode_attention: lengths must be an array, got None"):
        decode_attention(**qkv(f), lengths=None)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_that_ask_for_a_gradient_are_refused_outside_no_grad(name):
    given = arrays(Kind("torch", "float32"), (1, 2, 4), (3, 2), [3])
    given[name].requires_grad_()
    with pytest.raises(ValueError, match="gradient") as caught:
        decode_attention(**given)
    want = f"decode_attention: {name} must not require a gradient, which this op has not; use torch.no_grad()"
    assert str(caught.value) == want
    with torch.no_grad():
        decode_attention(**given)


def test_it_is_public():
    assert gpukernels.decode_attention is decode_attention
