"""`cached_attention` and `sample_embed` in NumPy and in plain torch."""

import numpy as np
import pytest
import torch
from kinds import both, every_kind
from refusals import makers, refuses
from truth import Kind
from truth_steps import Steps, check_cached_attention

import gpukernels
from gpukernels import cached_attention, sample_embed
from gpukernels.verify.compare import host

CASES = {
    "a token": {"lengths": [9, 1, 0]},
    "a token, a window": {"lengths": [9, 3, 0], "window": 3},
    "a prompt": {"new": 5, "lengths": [5, 9, 7]},
    "a prompt, the last query": {"new": 5, "queries": 1, "lengths": [5, 9, 7]},
    "a prompt with padding": {"new": 5, "lengths": [2, 0, 5]},
    "all of the cache": {"new": 9, "lengths": [9, 9, 9], "scale": 0.3},
    "a token, slices of one product, a window": {"lengths": [9, 3, 0], "window": 3, "packed": True},
    "a prompt, slices of one product": {"new": 5, "queries": 1, "lengths": [5, 9, 7], "packed": True},
    "a prompt, slices of one product, a window": {"new": 5, "lengths": [5, 9, 7], "window": 2, "packed": True},
    "own keys": {"heads": (3, 3), "lengths": [4, 0, 9]},
}


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_cached_attention(kind, case):
    check_cached_attention(kind, **CASES[case])


@every_kind
@pytest.mark.parametrize("drawing", [False, True])
def test_sample_embed(kind, drawing):
    Steps(kind, drawing=drawing).check()
    Steps(kind, drawing=drawing, positions=False).check()


def cache(f, i, **changed):
    given = {"q": f(2, 1, 4, 8), "k": f(2, 1, 2, 8), "v": f(2, 1, 2, 8), "keys": f(2, 5, 2, 8), "values": f(2, 5, 2, 8)}
    return given | {"lengths": i(5, 5)} | changed


WHAT = "must be (2, S, 2, 8) to match k"
CACHES = [
    (
        lambda f, i: cache(f, i, q=f(2, 4, 8)),
        ValueError,
        "q must be (B, T, H, D) with T, H and D of 1 or more, got (2, 4, 8)",
    ),
    (lambda f, i: cache(f, i, q=f(2, 2, 4, 8)), ValueError, "q has 2 positions but k only 1"),
    (lambda f, i: cache(f, i, k=f(2, 1, 3, 8)), ValueError, "k's heads must divide the 4 heads of q, got 3"),
    (lambda f, i: cache(f, i, keys=f(2, 5, 4, 8)), ValueError, f"keys {WHAT}, got (2, 5, 4, 8)"),
    (
        lambda f, i: cache(f, i, values=f(2, 6, 2, 8)),
        ValueError,
        "values must be (2, 5, 2, 8) to match keys, got (2, 6, 2, 8)",
    ),
    (
        lambda f, i: cache(f, i, keys=f(2, 5, 2, 8, dtype="float16")),
        TypeError,
        "keys must have q's dtype float32, got float16",
    ),
    (lambda f, i: cache(f, i, window=0), ValueError, "window must be a whole number, 1 or more, got 0"),
    (
        lambda f, i: cache(f, i, arrivals=i(0, 0)),
        ValueError,
        "arrivals must be (2, 4) one counter for each row and head, got (2,)",
    ),
]


@both
@pytest.mark.parametrize(("given", "error", "message"), CACHES, ids=[message for *_, message in CACHES])
def test_cached_attention_refuses(library, given, error, message):
    arguments = given(*makers(library))
    refuses(lambda: cached_attention(**arguments), error, f"cached_attention: {message}")


def state(f, i, **changed):
    given = {"logits": f(2, 7), "lengths": i(1, 1), "weight": f(7, 4), "position_weight": f(5, 4), "x": f(2, 1, 4)}
    return given | changed


STATES = [
    (lambda f, i: state(f, i, logits=f(7)), ValueError, "logits must be (B, V) with V of 1 to 4194304, got (7,)"),
    (lambda f, i: state(f, i, lengths=i(1)), ValueError, "lengths must be (2,) one length for each row, got (1,)"),
    (lambda f, i: state(f, i, lengths=i(1, 1, dtype="int64")), TypeError, "lengths must be int32, got int64"),
    (
        lambda f, i: state(f, i, weight=f(6, 4)),
        ValueError,
        "weight must be (7, C) or longer, to match logits, got (6, 4)",
    ),
    (lambda f, i: state(f, i, x=f(2, 4)), ValueError, "x must be (2, 1, 4) to match logits and weight, got (2, 4)"),
    (
        lambda f, i: state(f, i, position_weight=f(5, 3)),
        ValueError,
        "position_weight must be (P, 4) to match weight, got (5, 3)",
    ),
    (
        lambda f, i: state(f, i, temperature=f(2)),
        ValueError,
        "a draw needs uniforms, or seed, stream and step, got nothing",
    ),
]


@both
@pytest.mark.parametrize(("given", "error", "message"), STATES, ids=[message for *_, message in STATES])
def test_sample_embed_refuses(library, given, error, message):
    arguments = given(*makers(library))
    refuses(lambda: sample_embed(**arguments), error, f"sample_embed: {message}")


@both
def test_what_is_written_may_not_be_copied(library):
    f, i = makers(library)
    spread = f(2, 5, 2, 16)[..., ::2]
    refuses(
        lambda: cached_attention(**cache(f, i, keys=spread)), ValueError,
        "cached_attention: keys is written and must have a contiguous last dimension, got the strides (160, 32, 16, 2)",
    )  # fmt: skip
    refuses(
        lambda: sample_embed(**state(f, i, lengths=i(1, 1, 1, 1)[::2])), ValueError,
        "sample_embed: lengths is written and must be contiguous, got the strides (2,)",
    )  # fmt: skip


@both
def test_what_has_no_elements_may_have_any_strides(library):
    f, i = makers(library)
    none = np.zeros((2, 0, 2, 8), np.float32)
    assert none.strides == (0, 0, 0, 0)  # of NumPy, and so of the tensor that shares it
    none = none if library == "numpy" else torch.from_numpy(none)
    assert host(cached_attention(**cache(f, i, keys=none, values=none, lengths=i(0, 0)))).any() == 0


@pytest.mark.parametrize("name", ["q", "k", "v", "keys", "values"])
def test_there_is_no_gradient(name):
    given = cache(*makers("torch"))
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"cached_attention: {name} must not require a gradient"):
        cached_attention(**given)


def test_a_step_of_no_rows():
    kind = Kind("numpy", "float32")
    check_cached_attention(kind, batch=0, lengths=[])
    assert gpukernels.sample_embed(
        kind.draw(0, 7), lengths=kind.ints([]), weight=kind.draw(7, 4), x=kind.draw(0, 1, 4)
    ).shape == (0,)
