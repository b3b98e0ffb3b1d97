"""GELU, SwiGLU and RoPE in NumPy and in plain torch: against the float64 truth, by property, and what they refuse."""

import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import both, every_kind, numpy_kinds
from refusals import NO_FLOAT, NO_INT, makers, refuses
from test_op_errors import STORAGE, restrided
from test_ops import BLOCK, around
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb
from truth import Kind, check

from gpukernels import gelu, rope, swiglu
from gpukernels.numpy_ops.rope import _default_frequencies
from gpukernels.torch_ops.rope import default_frequencies
from gpukernels.verify.compare import host
from gpukernels.verify.truth import bound, true_rope

APPROXIMATE = ["tanh", "none"]
every_shape = pytest.mark.parametrize("shape", [(), (7,), (1, 64), (2, 3, 5), (0, 5), (2, 0), (2, 0, 5)], ids=str)


@every_kind
@every_shape
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu(kind, shape, approximate):
    for spread in (1, 10):
        check("gelu", {"x": kind.draw(*shape, spread=spread)}, approximate=approximate)


@every_kind
@every_shape
def test_swiglu(kind, shape):
    for spread in (1, 10):
        check("swiglu", {"gate": kind.draw(*shape, spread=spread), "up": kind.draw(*shape, seed=1)})
    packed = kind.draw(*shape[:-1], 2 * (shape or (1,))[-1])
    half = packed.shape[-1] // 2
    check("swiglu", {"gate": packed[..., :half], "up": packed[..., half:]})


@pytest.mark.parametrize("shape", [(256, 4096), (4, 64, 4096)], ids=str)
def test_the_halves_of_a_product_are_not_copied_in_numpy(shape):
    packed = np.ones((*shape[:-1], 2 * shape[-1]), np.float32)
    gate, up = packed[..., : shape[-1]], packed[..., shape[-1] :]
    tracemalloc.start()
    y = swiglu(gate, up)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * y.nbytes


def test_slices_of_a_packed_projection_are_turned_where_they_lie():
    """By NumPy: queries and keys in one call, of which the second are fewer heads."""
    packed = Kind("numpy", "float32").draw(2, 64, 4 + 2 * 2, 64)
    positions = np.arange(128, dtype=np.int32).reshape(2, 64)
    check("rope", {"x": packed[:, :, :6], "positions": positions})
    np.testing.assert_array_equal(rope(packed[:, :, :6], positions)[:, :, 4:], rope(packed[:, :, 4:6], positions))


@numpy_kinds
@around
def test_around_a_block_of_elements(kind, step):
    rows = BLOCK // 64 + step
    check("gelu", kind.draws(x=(rows, 64)))
    check("swiglu", kind.draws(gate=(rows, 64), up=(rows, 64)))
    check("gelu", kind.draws(x=(3, BLOCK + step)))


FINITE = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.7e308}


@every_kind
def test_large_values_saturate_and_minus_infinity_is_not_a_number(kind):
    """It is 0 times infinity, as the formulas have it."""
    large, up = FINITE[kind.dtype], kind.array(np.ones(3))
    x = kind.array([large, -large, 0.0])
    infinite = kind.array([math.inf, -math.inf, math.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finite, not_finite = [gelu(x), swiglu(x, up)], [gelu(infinite), swiglu(infinite, up)]
        exact = gelu(x, approximate="none")
    for result in finite:
        np.testing.assert_array_equal(host(result), [host(x)[0], 0, 0])
    if kind.arrays == "numpy" or kind.dtype == "float64":  # torch's vectorised form makes 3.4e38 infinite
        # NumPy's erf is within 4e-7 of 1, not 1.
        np.testing.assert_allclose(host(exact), [host(x)[0], 0, 0], rtol=0, atol=4e-7 * large)
    for result in not_finite:
        np.testing.assert_array_equal(host(result), [math.inf, math.nan, math.nan])


# By what is special: the shape of x, positions, and how many pairs rotate (None: all, at the default frequencies).
ROPE = {
    "plain": ((2, 5, 3, 8), [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], None),
    "one pair": ((1, 3, 2, 2), [[0, 1, 2]], None),
    "one position": ((3, 1, 4, 16), [[5], [0], [1000]], 8),
    "partial": ((2, 3, 2, 10), [[0, 1, 2], [9, 1, 9]], 3),
    "one of many": ((1, 2, 1, 12), [[3, 4]], 1),
    "far": ((1, 4, 2, 64), [[131072, 131071, 99991, 16385]], 32),
    "back": ((1, 3, 2, 8), [[-1, -7, -131072]], 4),
    "no rows": ((0, 3, 2, 4), np.zeros((0, 3)), None),
    "no positions": ((2, 0, 2, 4), [[], []], None),
    "no heads": ((1, 1, 0, 4), [[3]], None),
}
every_rope = pytest.mark.parametrize("case", ROPE)
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def rope_arrays(kind, case, integer="int32"):
    shape, positions, pairs = ROPE[case]
    arrays = {"x": kind.draw(*shape), "positions": kind.ints(positions, integer)}
    if pairs is not None:
        frequencies = 10000.0 ** (-np.arange(pairs) / pairs)
        arrays["frequencies"] = kind._replace(dtype="float32").array(frequencies)
    return arrays


@every_kind
@every_rope
@both_pairings
def test_rope(kind, case, interleaved):
    for integer in ("int32", "int64"):
        check("rope", rope_arrays(kind, case, integer), interleaved=interleaved)


THETAS = pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0, 12345.6])


@THETAS
@pytest.mark.parametrize("width", [2, 64, 80, 96, 128, 256])
def test_default_frequencies_are_those_of_transformers(theta, width):
    config = LlamaConfig(head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": theta})
    theirs = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(default_frequencies(theta, width), theirs)
    ours = _default_frequencies(theta, width)
    assert (abs(ours - theirs.numpy()) <= np.spacing(theirs.numpy())).all()


@THETAS
def test_rope_is_that_of_transformers(theta):
    """Theirs rounds two products and a sum in float32, and so does ours: twice the bound."""
    kind = Kind("torch", "float32")
    x, positions = kind.draw(2, 9, 3, 64), kind.ints([range(9), range(4000, 4009)], "int64")
    config = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    magnitude = true_rope(host(x), host(positions), theta=theta).magnitude
    assert (abs(host(rope(x, positions, theta=theta)) - host(theirs)) <= 2 * bound("float32", 1, magnitude)).all()


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(q=st.integers(0, 500), k=st.integers(0, 500), by=st.integers(-100, 10000), interleaved=st.booleans(), seed=seeds)
def test_a_score_depends_on_the_distance_only(q, k, by, interleaved, seed):
    """Exact frequencies and float64, so that a shifted position is the same angle exactly."""
    x = np.random.default_rng(seed).standard_normal((1, 2, 1, 8))
    frequencies = np.array([1, 0.5, 0.125, 0.0625], np.float32)
    scores = []
    for shift in (0, by):
        positions = np.array([[q + shift, k + shift]])
        turned = rope(x, positions, frequencies=frequencies, interleaved=interleaved)[0, :, 0]
        scores.append(turned[0] @ turned[1])
    assert abs(scores[0] - scores[1]) <= bound("float64", 8, abs(x[0, 0, 0]).sum() * abs(x[0, 1, 0]).max())


@both
@settings(max_examples=40, deadline=None)
@given(position=st.integers(-(2**31), 2**31 - 1), interleaved=st.booleans(), seed=seeds)
def test_turning_by_the_negative_frequencies_turns_back(library, position, interleaved, seed):
    kind = Kind(library, "float32")
    x, positions = kind.draw(1, 1, 2, 8, seed=seed), kind.ints([[position]])
    frequencies = kind.array([1.0, 0.3, 0.1, 0.03])
    there = rope(x, positions, frequencies=frequencies, interleaved=interleaved)
    back = rope(there, positions, frequencies=-frequencies, interleaved=interleaved)
    assert (abs(host(back) - host(x)) <= 4 * bound("float32", 1, abs(host(x)).max())).all()


def test_gradients_are_those_of_finite_differences():
    kind = Kind("torch", "float64")
    x, up = kind.draw(3, 4).requires_grad_(), kind.draw(3, 4, seed=1).requires_grad_()
    for approximate in APPROXIMATE:
        assert torch.autograd.gradcheck(lambda x, name=approximate: gelu(x, approximate=name), x)
    assert torch.autograd.gradcheck(swiglu, (x, up))
    for case in ("plain", "partial"):
        arrays = rope_arrays(kind, case)
        arrays["x"].requires_grad_()
        for interleaved in (False, True):
            assert torch.autograd.gradcheck(
                lambda x, arrays=arrays, how=interleaved: rope(**arrays | {"x": x}, interleaved=how), arrays["x"]
            )


@pytest.mark.parametrize("op", ["gelu", "swiglu", "rope"])
@pytest.mark.parametrize(("kind", "how"), STORAGE)
def test_any_strides_will_do(kind, how, op):
    arrays = {
        "gelu": lambda: kind.draws(x=(2, 5, 6)),
        "swiglu": lambda: kind.draws(gate=(2, 5, 6), up=(2, 5, 6)),
        "rope": lambda: rope_arrays(kind, "partial"),
    }[op]()
    check(op, {name: restrided(array, how) for name, array in arrays.items()})


PAIRS = "x must be (B, T, H, D) with an even D of 2 or more"
REFUSED = {
    gelu: [
        (lambda f, i: gelu(i(3)), TypeError, f"x {NO_FLOAT}, got int32"),
        (lambda f, i: gelu(f(3), approximate="erf"), ValueError, "approximate must be one of tanh, none, got 'erf'"),
        (lambda f, i: gelu(f(3), approximate=None), ValueError, "approximate must be one of tanh, none, got None"),
    ],
    swiglu: [
        (lambda f, i: swiglu(i(3), f(1)), TypeError, f"gate {NO_FLOAT}, got int32"),
        (lambda f, i: swiglu(f(1), i(3)), TypeError, f"up {NO_FLOAT}, got int32"),
        (lambda f, i: swiglu(f(2, 3), f(3)), ValueError, "up must be (2, 3) to match gate, got (3,)"),
        (
            lambda f, i: swiglu(f(3), f(3, dtype="float16")),
            TypeError,
            "up must have gate's dtype float32, got float16",
        ),
    ],
    rope: [
        (lambda f, i: rope(i(3), i(3)), TypeError, f"x {NO_FLOAT}, got int32"),
        (lambda f, i: rope(f(1, 2, 3, 4), f(1, 2)), TypeError, f"positions {NO_INT}, got float32"),
        (lambda f, i: rope(f(2, 3, 4), i(1)), ValueError, f"{PAIRS}, got (2, 3, 4)"),
        (lambda f, i: rope(f(1, 2, 3, 5), i(1)), ValueError, f"{PAIRS}, got (1, 2, 3, 5)"),
        (lambda f, i: rope(f(1, 2, 3, 0), i(1)), ValueError, f"{PAIRS}, got (1, 2, 3, 0)"),
        (lambda f, i: rope(f(1, 2, 3, 4), i(1, 2)), ValueError, "positions must be (1, 2) to match x, got (2,)"),
        (lambda f, i: rope(f(1, 1, 3, 4), i([1]), theta=0), ValueError, "theta must be a number above 0, got 0"),
        (
            lambda f, i: rope(f(1, 1, 3, 4), i([1]), theta=math.inf),
            ValueError,
            "theta must be a number above 0, got inf",
        ),
        (lambda f, i: rope(f(1, 1, 3, 4), i([1]), theta="a"), ValueError, "theta must be a number above 0, got 'a'"),
        (
            lambda f, i: rope(f(1, 1, 3, 4), i([1]), theta=math.nan),
            ValueError,
            "theta must be a number above 0, got nan",
        ),
        (
            lambda f, i: rope(f(1, 1, 3, 4), i([1]), frequencies=f(2, dtype="float64")),
            TypeError,
            "frequencies must be float32, got float64",
        ),
        *(
            (
                lambda f, i, shape=shape: rope(f(1, 1, 3, 4), i([1]), frequencies=f(*shape)),
                ValueError,
                f"frequencies must be (R/2,) with 1 to 2 of them for x (1, 1, 3, 4), got {shape}",
            )
            for shape in ((0,), (3,), (1, 2))
        ),
    ],
}
CASES = [
    pytest.param(call, error, f"{op.__name__}: {message}", id=f"{op.__name__} {message}")
    for op, cases in REFUSED.items()
    for call, error, message in cases
]


@both
@pytest.mark.parametrize(("call", "error", "message"), CASES)
@pytest.mark.usefixtures("computing_nothing")
def test_a_call_that_cannot_be_is_refused_in_words(library, call, error, message):
    refuses(lambda: call(*makers(library)), error, message)


@both
@pytest.mark.usefixtures("computing_nothing")
def test_a_missing_array_is_refused_by_name(library):
    f, _ = makers(library)
    calls = {
        "gelu: x": lambda: gelu(None),
        "swiglu: up": lambda: swiglu(f(4), None),
        "rope: positions": lambda: rope(f(1, 1, 1, 2), None),
    }
    for named, call in calls.items():
        with pytest.raises(TypeError, match=f"^{named} "):
            call()
