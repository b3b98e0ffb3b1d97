"""`sample` and `uniform` in NumPy and in plain torch: the weights and thresholds against their definitions, and
the same choice from both."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import both
from refusals import makers
from sampling_cases import mixed, on, plain

import gpukernels
from gpukernels import sample, uniform
from gpukernels.numpy_ops.sampling import EXP2, candidates
from gpukernels.torch_ops.sampling import _part
from gpukernels.verify.compare import host

LARGEST = 1 - 2.0**-24  # of the numbers that `uniform` gives


def logits_of(weights):
    """Logits whose softmax is `weights` over their sum; equal weights give equal logits."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(weights, np.float64)).astype(np.float32)


def probabilities(logits, temperature=1.0, **options):
    """What the thresholds leave: (V,), summing to 1."""
    with np.errstate(over="ignore"):
        ids, weights = candidates(logits, temperature, **{name: x for name, x in options.items() if x is not None})
    result = np.zeros(logits.size)
    result[ids] = weights / weights.sum()
    return result


def distance_bound(spread):
    """Of a probability, relative to itself: its own weight's, and that of the sum of all; see `numpy_ops.sampling`."""
    return 2 * 2.0**-22 * (1 + spread) + 1e-12


def test_the_polynomial_for_every_fraction():
    """Within 4.4e-9 of 2^-f, never rising, and exact where an octave begins."""
    before = 2**31 + 1
    for start in range(0, 2**24, 2**18):
        fraction = np.arange(start, start + 2**18, dtype=np.int64)
        power = np.full_like(fraction, EXP2[-1])
        for coefficient in EXP2[-2::-1]:
            power = coefficient - (power * (fraction << 8) >> 32)
        assert start or power[0] == 2**31
        assert power[0] <= before
        assert (np.diff(power) <= 0).all()
        assert abs(power / 2.0**31 / np.exp2(-fraction / 2.0**24) - 1).max() < 4.4e-9
        before = power[-1]
    assert before >= 2**30


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=30), st.floats(2**-6, 2**6, width=32))
def test_weights_are_exponentials(logits, temperature):
    logits = np.array(logits, np.float32)
    ids, weights = candidates(logits, temperature)
    np.testing.assert_array_equal(ids, np.arange(logits.size))
    assert weights[logits.argmax()] == 2**40
    nats = (logits.max() - logits.astype(np.float64)) / temperature
    with np.errstate(under="ignore"):
        want = np.exp(-nats)
    assert (abs(weights / 2.0**40 - want) <= 2.0**-22 * (1 + nats) * want + 2.0**-40).all()


def kept_by_definition(weights, k=None, p=None, m=None):
    """The tokens that top-k, then top-p, then min-p keep, by their definitions, in exact fractions."""
    kept = {token for token, weight in enumerate(weights) if weight}
    if k:
        kept = {token for token in kept if sum(weights[other] > weights[token] for other in kept) < k}
    if p is not None:
        # A token stays if those that are strictly likelier do not reach p without it; the best always stays.
        total = sum(weights[token] for token in kept)
        likelier = {t: sum(weights[other] for other in kept if weights[other] > weights[t]) for t in kept}
        # Of tokens as likely as each other the first may reach p alone: those that tie with it are kept too.
        kept = {t for t in kept if likelier[t] == 0 or Fraction(likelier[t], total) < p}
    if m is not None:
        kept = {token for token in kept if weights[token] >= m * max(weights)}
    return kept


weight_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=300, deadline=None)
@given(
    weights=weight_lists, k=st.none() | st.integers(0, 15), p=st.none() | st.floats(0, 1), m=st.none() | st.floats(0, 1)
)
def test_what_is_kept_is_what_the_definitions_say(weights, k, p, m):
    # A threshold half-way between two possible sums or ratios: rounding decides no case.
    of_k = sum(weights[token] for token in kept_by_definition(weights, k))
    p = None if p is None else Fraction(2 * int(p * (of_k - 1)) + 1, 2 * of_k)
    m = None if m is None else Fraction(2 * int(m * (max(weights) - 1)) + 1, 2 * max(weights))
    options = {"top_k": k, "top_p": p if p is None else float(p), "min_p": m if m is None else float(m)}
    got = probabilities(logits_of(weights), **options)
    kept = kept_by_definition(weights, k, p, m)
    assert set(np.flatnonzero(got)) == kept
    total = sum(weights[token] for token in kept)
    want = [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]
    # A logit of log(9) at most, rounded to float32, changes its probability by that much too.
    np.testing.assert_allclose(got, want, rtol=distance_bound(math.log(9)) + 2 * math.log(9) * 2**-24)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0}, {1, 3}),
        ({"top_p": 0.1}, {1, 3}),
        ({"top_p": 0.7}, {0, 1, 2, 3}),
        ({"top_p": 1}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.49}, {0, 1, 2, 3}),
        ({"min_p": 0.51}, {1, 3}),
        ({"min_p": 1}, {1, 3}),
        ({"min_p": 0}, {0, 1, 2, 3, 4}),
        ({"top_k": 4, "top_p": 0.5, "min_p": 0.1}, {1, 3}),
    ],
)
def test_tokens_that_tie_at_a_threshold_are_all_kept(options, kept):
    assert set(np.flatnonzero(probabilities(logits_of([2, 4, 2, 4, 1]), **options))) == kept


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_agree_with_transformers(seed):
    """transformers' processors, in the order in which its `generate` applies them."""
    random = np.random.default_rng(seed)
    logits = (3 * random.standard_normal(300)).astype(np.float32)
    options = {
        "temperature": random.uniform(0.3, 3),
        "top_k": int(random.integers(1, 300)) if seed % 2 else None,
        "top_p": random.uniform(0.3, 1) if seed % 3 else None,
        "min_p": random.uniform(0, 0.3) if seed % 5 else None,
    }
    make = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = torch.from_numpy(logits)[None].double()
    for name, process in make.items():
        scores = scores if options[name] is None else process(options[name])(None, scores)
    want = torch.softmax(scores, -1)[0].numpy()
    got = probabilities(logits, **options)
    spread = np.ptp(logits) / options["temperature"]
    visible = 2.0**-40 * want.max()  # a weight is rounded down to a multiple of this part of the largest
    np.testing.assert_array_equal((got > 0)[want > 2 * visible], True)
    assert not got[want == 0].any()
    assert (abs(got - want) <= distance_bound(spread) * want + 300 * visible).all()


def test_extreme_temperatures_and_logits():
    logits = np.array([1e38, -1e38, 1e38, 0, -np.inf], np.float32)
    for temperature in (1e-6, 1.0, 1e6, 5e-324):
        np.testing.assert_array_equal(probabilities(logits, temperature), [0.5, 0, 0.5, 0, 0])
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(probabilities(np.array([largest, -largest], np.float32)), [1, 0])
    logits = np.array([0, 1, -np.inf, 2], np.float32)
    np.testing.assert_array_equal(probabilities(logits, 1e-6), [0, 0, 0, 1])
    for temperature in (1e6, 1e300):
        np.testing.assert_allclose(probabilities(logits, temperature), [1 / 3, 1 / 3, 0, 1 / 3], rtol=2e-6)


@both
@pytest.mark.parametrize(("size", "times"), [(1, 2), (2, 10), (31, 20), (1000, 1)])
def test_numpy_and_torch_make_the_same_choice(library, size, times):
    """Thousands of rows: every option on and off by row, left out by call; ties, -inf, the ends of the draw."""
    for seed in range(times):
        logits, options = mixed(seed, 60, size)
        for left_out in ((), ("top_k",), ("top_p", "min_p"), ("repetition_penalty", "seen")):
            some = {name: x for name, x in options.items() if name not in left_out}
            want = [plain(logits[row], **{name: x[row] for name, x in some.items()}) for row in range(60)]
            got = sample(on(library, logits), **{name: on(library, x) for name, x in some.items()})
            np.testing.assert_array_equal(host(got), want)


@both
def test_greedy_rows_take_the_lowest_id_of_the_best_and_draw_nothing(library):
    logits = np.array([[1, 7, 3, 7, 7], [-0.0, 0.0, -1, 0.0, -2]], np.float32)
    assert host(sample(on(library, logits))).tolist() == [1, 0]
    zero = on(library, np.zeros(2, np.float32))
    nothing = on(library, np.array([np.nan, 0.3], np.float32))
    assert host(sample(on(library, logits), temperature=zero, uniforms=nothing)).tolist() == [1, 0]
    seen = on(library, np.array([[0, 1, 0, 1, 0]] * 2, bool))
    two = on(library, np.array([2, 2], np.float32))
    assert host(sample(on(library, logits), repetition_penalty=two, seen=seen)).tolist() == [4, 0]


@both
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_row_that_overflowed_is_minus_one_and_its_neighbours_are_not(library, bad):
    logits = np.array([[0, bad, 1], [0, 2, 1], [-np.inf] * 3, [1, -np.inf, 0]], np.float32)
    for temperature in (0, 1):
        numbers = {"temperature": np.full(4, temperature, np.float32), "uniforms": np.full(4, 0.1, np.float32)}
        got = sample(on(library, logits), **{name: on(library, x) for name, x in numbers.items()})
        assert host(got).tolist() == [-1, host(got)[1], -1, 0]
        assert host(got)[1] >= 0
    overflowing = {"repetition_penalty": np.full(4, 1e-38, np.float32), "seen": np.ones((4, 3), bool)}
    got = sample(on(library, logits[1:2] * 1e3), **{name: on(library, x[:1]) for name, x in overflowing.items()})
    assert host(got).tolist() == [-1]


@both
def test_the_type_of_the_options_and_of_the_logits(library):
    logits, options = mixed(3, 50, 40)
    coarse = logits.astype(np.float16)
    want = host(sample(on(library, coarse.astype(np.float32)), **{name: on(library, x) for name, x in options.items()}))
    wide = {name: x.astype({"f": np.float64, "i": np.int64}.get(x.dtype.kind, x.dtype)) for name, x in options.items()}
    for array in (coarse, coarse.astype(np.float64)):
        got = sample(on(library, array), **{name: on(library, x) for name, x in wide.items()})
        np.testing.assert_array_equal(host(got), want)
        assert str(got.dtype).removeprefix("torch.") == "int64"
    assert sample(on(library, logits[:0])).shape == (0,)
    # float16 holds no 2^24, in units of which a draw is made.
    numbers = {"temperature": np.ones(50, np.float16), "uniforms": np.linspace(0, 0.99, 50, dtype=np.float16)}
    half = host(sample(on(library, logits), **{name: on(library, x) for name, x in numbers.items()}))
    single = {name: on(library, x.astype(np.float32)) for name, x in numbers.items()}
    np.testing.assert_array_equal(half, host(sample(on(library, logits), **single)))
    assert len(set(half.tolist())) > 10


def words(seed, stream, step):
    """Philox-4x32-10 as its paper has it: ten rounds of two 32 x 32 bit products, the key bumped between."""
    counter, key = [step % 2**32, stream % 2**32, 0, 0], [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(counter[0] * 0xD2511F53, 2**32), divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@both
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3), max_size=5))
def test_uniform_is_philox(library, rows):
    given = [on(library, np.array([row[i] for row in rows], np.int64)) for i in range(3)]
    got = uniform(*given)
    assert str(got.dtype).removeprefix("torch.") == "float32"
    assert host(got).tolist() == [(words(*row)[0] >> 8) / 2**24 for row in rows]


@both
def test_seeds_draw_what_uniform_draws(library):
    logits, options = mixed(5, 60, 100)
    del options["uniforms"]
    random = np.random.default_rng(0)
    numbers = {name: random.integers(-(2**31), 2**31, 60).astype(np.int32) for name in ("stream", "step")}
    numbers["seed"] = random.integers(-(2**63), 2**63, 60)
    numbers = {name: on(library, x) for name, x in numbers.items()}
    options = {name: on(library, x) for name, x in options.items()}
    want = sample(on(library, logits), **options, uniforms=uniform(**numbers))
    np.testing.assert_array_equal(host(sample(on(library, logits), **options, **numbers)), host(want))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**24 - 1), st.sampled_from([0, 2**24 - 1]))
def test_a_part_of_a_sum_is_exact_beyond_64_bits(whole, part, more):
    assert _part(torch.tensor([whole]), torch.tensor([part]), more).item() == (whole * part + more) >> 24


@both
def test_a_large_vocabulary_of_equals(library):
    x, one = on(library, np.zeros((1, 2**20), np.float32)), np.ones(1, np.float32)
    for draw, token in ((0, 0), (0.5, 2**19), (LARGEST, 2**20 - 1)):
        got = sample(x, temperature=on(library, one), uniforms=on(library, one * np.float32(draw)))
        assert host(got).tolist() == [token]


@both
def test_a_value_outside_its_range_counts_as_the_end_of_it(library):
    logits, options = mixed(9, 40, 30)
    for name, values in (
        ("temperature", (-1, 0)),
        ("top_k", (-5, 0)),
        ("top_p", (-1, 0)),
        ("top_p", (7, 1)),
        ("min_p", (-1, 0)),
        ("min_p", (2, 1)),
        ("uniforms", (-0.5, 0)),
        ("uniforms", (1.5, LARGEST)),
        ("temperature", (math.inf, 1e38)),
        ("temperature", (math.nan, 0)),
        ("top_p", (math.inf, 1)),
        ("top_p", (-math.inf, 0)),
        ("min_p", (math.inf, 1)),
        ("min_p", (-math.inf, 0)),
        ("uniforms", (math.inf, LARGEST)),
        ("uniforms", (-math.inf, 0)),
    ):
        results = []
        for value in values:
            some = options | {name: np.full_like(options[name], value)}
            results.append(host(sample(on(library, logits), **{key: on(library, x) for key, x in some.items()})))
        np.testing.assert_array_equal(*results, err_msg=name)


LOGITS = "logits must be (B, V) with V of 1 to 4194304"
DRAW = "a draw needs uniforms, or seed, stream and step, got"
TOGETHER = "repetition_penalty and seen go together, got only"
REFUSED = [
    (lambda f, i: {"logits": f(5)}, ValueError, f"{LOGITS}, got (5,)"),
    (lambda f, i: {"logits": f(2, 0)}, ValueError, f"{LOGITS}, got (2, 0)"),
    (lambda f, i: {"logits": i(1)}, TypeError, "logits must be a floating-point array, got int32"),
    (lambda f, i: {"temperature": i(1, 1), "uniforms": f(2)}, TypeError, "temperature must be a floating-point array"),
    (lambda f, i: {"top_k": f(2)}, TypeError, "top_k must be int32 or int64, got float32"),
    (lambda f, i: {"top_p": f(3)}, ValueError, "top_p must be (2,) one value for each row, got (3,)"),
    (lambda f, i: {"min_p": f(2, 1)}, ValueError, "min_p must be (2,) one value for each row, got (2, 1)"),
    (lambda f, i: {"seen": f(2, 5, dtype="bool")}, ValueError, f"{TOGETHER} seen"),
    (lambda f, i: {"repetition_penalty": f(2)}, ValueError, f"{TOGETHER} repetition_penalty"),
    (lambda f, i: {"seen": f(2, 4, dtype="bool")}, ValueError, "seen must be (2, 5) to match logits, got (2, 4)"),
    (lambda f, i: {"seen": f(2, 5, dtype="uint8")}, TypeError, "seen must be bool, got uint8"),
    (lambda f, i: {"temperature": f(2)}, ValueError, f"{DRAW} nothing"),
    (lambda f, i: {"temperature": f(2), "seed": i(1, 1), "step": i(1, 1)}, ValueError, f"{DRAW} seed, step"),
    (lambda f, i: {"uniforms": f(2), "seed": i(1, 1)}, ValueError, f"{DRAW} uniforms, seed"),
    (lambda f, i: {"seed": f(2)}, TypeError, "seed must be int32 or int64, got float32"),
]


@both
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_call_that_cannot_be_is_refused_in_words(library, call, error, message):
    f, i = makers(library)
    given = {"logits": f(2, 5)} | call(f, i)
    with pytest.raises(error) as caught:
        sample(**given)
    assert str(caught.value).startswith(f"sample: {message}")


@both
def test_uniform_refuses_what_it_cannot_use(library):
    f, i = makers(library)
    for arrays, error, message in (
        ((f(2), i(1, 1), i(1, 1)), TypeError, "seed must be int32 or int64, got float32"),
        ((i(1, 1), i(1), i(1, 1)), ValueError, "stream must be (2,) to match seed, got (1,)"),
        ((f(2, 1), i(1), i(1)), ValueError, "seed must be (B,), got (2, 1)"),
    ):
        with pytest.raises(error) as caught:
            uniform(*arrays)
        assert str(caught.value) == f"uniform: {message}"


def test_logits_that_ask_for_a_gradient_are_refused_outside_no_grad():
    logits = torch.ones(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="sample: logits must not require a gradient"):
        sample(logits)
    with torch.no_grad():
        assert gpukernels.sample(logits).tolist() == [0, 0]
