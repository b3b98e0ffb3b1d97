"""From logits to a token: the settings, one row against transformers, the draw, the random numbers.

The thresholds themselves are tested in `test_ops_sampling.py`.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from choice import choose, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelError, Sampling

LARGEST = 1 - 2.0**-24  # of the numbers that `uniform` gives


@pytest.mark.parametrize(
    ("name", "wrong", "want"),
    [
        (
            "temperature",
            [-1, -1e-9, math.nan, math.inf, np.float32("inf"), "1", None, True, [1], 1j],
            "a number, 0 or more",
        ),
        ("top_k", [-1, 2.0, "5", True, math.nan], "a whole number, 0 or more, or None"),
        ("top_p", [-0.1, 1.1, math.nan, "0.5", True], "a number from 0 to 1, or None"),
        ("min_p", [-0.1, 1.1, math.inf, [], False], "a number from 0 to 1, or None"),
        ("repetition_penalty", [0, -1, math.nan, math.inf, np.float16("nan"), None, True], "a number above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(name, wrong, want):
    for value in wrong:
        with pytest.raises(ModelError) as caught:
            Sampling(**{name: value})
        assert str(caught.value) == f"{name} must be {want}, got {value!r}"


def test_a_whole_number_beyond_all_floats_is_refused_too():
    for name in ("temperature", "top_p", "repetition_penalty"):
        with pytest.raises(ModelError, match=f"{name} must be a number"):
            Sampling(**{name: 10**400})


@pytest.mark.filterwarnings("error")
def test_the_ends_of_every_range_and_numpy_numbers_are_accepted():
    Sampling(temperature=0, top_k=0, top_p=0, min_p=0, repetition_penalty=1e-3)
    Sampling(temperature=np.float32(1), top_k=np.int64(3), top_p=np.float16(1), min_p=1, repetition_penalty=10)
    Sampling(top_k=None, top_p=None, min_p=None)


def logits_of(weights):
    """Logits whose softmax is `weights` over their sum; equal weights give equal logits."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(weights, np.float64)).astype(np.float32)


weight_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_and_penalty_agree_with_transformers(seed):
    """transformers' processors, in the order in which its `generate` applies them."""
    random = np.random.default_rng(seed)
    logits = (3 * random.standard_normal(300)).astype(np.float32)
    seen = random.choice(300, 40, replace=False)
    options = {
        "temperature": random.uniform(0.3, 3),
        "top_k": int(random.integers(1, 300)) if seed % 2 else None,
        "top_p": random.uniform(0.3, 1) if seed % 3 else None,
        "min_p": random.uniform(0, 0.3) if seed % 5 else None,
        "repetition_penalty": random.uniform(0.5, 2),
    }
    make = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = torch.from_numpy(logits)[None].double()
    for name, process in make.items():
        if options[name] is not None:
            scores = process(options[name])(torch.from_numpy(seen)[None], scores)
    want = torch.softmax(scores, -1)[0].numpy()

    # The draw is the only way out for the penalty: every token is chosen exactly over its own interval.
    sampling = Sampling(**options)
    edges = np.concatenate([[0], np.cumsum(want)])
    middles = (edges[1:] + edges[:-1]) / 2
    for token in np.flatnonzero(want > 1e-5):
        assert choose(logits, sampling, float(middles[token]), seen) == token
    assert {choose(logits, sampling, draw, seen) for draw in np.linspace(0, LARGEST, 500)} <= set(np.flatnonzero(want))


def test_temperature_zero_takes_the_lowest_id_of_the_best_and_no_random_number():
    logits = np.array([1, 7, 3, 7, 7], np.float32)
    for draw in (0.0, 0.5, LARGEST, math.nan):
        assert choose(logits, Sampling(), draw) == 1
    options = {"top_k": 5, "top_p": 1.0, "min_p": 0.0}
    assert choose(logits, Sampling(temperature=0, **options), 0.99) == 1
    assert choose(logits, Sampling(repetition_penalty=2.0), 0.0, {1, 3}) == 4


def test_the_penalty_falls_on_seen_tokens_once_and_leaves_the_logits_alone():
    logits = np.array([4, 3, -1, -1.5], np.float32)
    before = logits.copy()
    assert choose(logits, Sampling(repetition_penalty=2.0), 0.0, [0]) == 1  # 2, 3
    assert choose(logits, Sampling(repetition_penalty=2.0), 0.0, {0, 1}) == 0  # 2, 1.5
    assert choose(logits, Sampling(repetition_penalty=8.0), 0.0, {0, 1}) == 0  # 0.5, 0.375
    assert choose(-logits - 2, Sampling(repetition_penalty=2.0), 0.0, {3}) == 2  # -1, and -0.5 becomes -1
    assert choose(logits, Sampling(repetition_penalty=0.1), 0.0, {1}) == 1  # 4, 30
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=200, deadline=None)
@given(weights=weight_lists, draw=st.integers(0, 2**24 - 1))
def test_a_draw_inverts_the_cumulative_distribution(weights, draw):
    total, sums = sum(weights), np.cumsum(weights)
    token = choose(logits_of(weights), Sampling(temperature=1), draw * 2.0**-24)
    assert weights[token] > 0
    # Exactly at an edge the rounding of the logits may decide for either side.
    place, slack = Fraction(draw, 2**24) * total, Fraction(total, 2**20)
    assert sums[token] - weights[token] - slack <= place <= sums[token] + slack


@pytest.mark.parametrize("weights", [[0, 0, 3, 0, 1, 0], [0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [5]])
def test_the_ends_of_the_draw_never_give_a_token_of_probability_zero(weights):
    possible = np.flatnonzero(weights)
    assert choose(logits_of(weights), Sampling(temperature=1), 0.0) == possible[0]
    for draw in (LARGEST, 1 - 2.0**-53):
        assert choose(logits_of(weights), Sampling(temperature=1), draw) == possible[-1]


def chi_square_limit(freedom: int) -> float:
    """What chi-square exceeds in one of a million cases: Wilson and Hilferty's cube of a normal variable."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def test_the_frequencies_are_the_probabilities():
    weights, draws = np.array([1, 2, 3, 5, 8, 13, 0, 21]), 10_000
    tokens = [choose(logits_of(weights), Sampling(temperature=1), uniform(1, 2, step)) for step in range(draws)]
    counts, expected = np.bincount(tokens, minlength=8), draws * weights / weights.sum()
    assert counts[6] == 0
    possible = weights > 0
    assert np.sum((counts - expected)[possible] ** 2 / expected[possible]) < chi_square_limit(6)


def test_extreme_temperatures_and_logits():
    logits = np.array([1e38, -1e38, 1e38, 0, -np.inf], np.float32)
    for temperature in (1e-6, 1.0, 1e6, 5e-324):  # float32 has no such number as the last
        assert [choose(logits, Sampling(temperature), draw) for draw in (0.0, 0.4999, 0.5, LARGEST)] == [0, 0, 2, 2]
    logits = np.array([0, 1, -np.inf, 2], np.float32)
    assert choose(logits, Sampling(1e-6), 0.0) == 3
    for temperature in (1e6, 1e300):
        assert [choose(logits, Sampling(temperature), draw) for draw in (0.33, 0.34, 0.67)] == [0, 1, 3]
    assert choose(logits, Sampling(1e6, top_p=0.0), LARGEST) == 3
    assert choose(logits, Sampling(1.0, top_k=4), LARGEST) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_choose_nothing(bad, temperature):
    assert choose(np.array([0, bad, 1], np.float32), Sampling(temperature), 0.5) == -1
    assert choose(np.full(3, -np.inf, np.float32), Sampling(temperature), 0.5) == -1


def philox(counter, key):
    """Philox-4x32-10 as its paper has it: ten rounds of two 32 x 32 bit products, the key bumped between."""
    words, keys = list(counter), list(key)
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(words[0] * 0xD2511F53, 2**32), divmod(words[2] * 0xCD9E8D57, 2**32)
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words


# The known answers of Random123, the library of Philox's authors: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_philox_of_this_test_gives_the_known_answers(counter, key, result):
    assert philox(counter, key) == result


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**32 - 1), step=st.integers(0, 2**32 - 1))
def test_uniform_is_philox(seed, stream, step):
    word = philox([step, stream, 0, 0], [seed % 2**32, seed >> 32])[0]
    assert uniform(seed, stream, step) == (word >> 8) / 2**24
    assert uniform(0, 0, 0) == 0x6627E8 / 2**24


def test_streams_are_uniform_and_independent():
    steps, cells = 2000, 20
    rows = [(1, 0), (1, 1), (2, 0), (1 + 2**32, 0)]  # another stream, another seed, low and high
    streams = np.array([[uniform(seed, stream, step) for step in range(steps)] for seed, stream in rows])
    assert ((streams >= 0) & (streams < 1)).all()
    for stream in streams:
        counts = np.bincount((cells * stream).astype(int), minlength=cells)
        assert np.sum((counts - steps / cells) ** 2) / (steps / cells) < chi_square_limit(cells - 1)
    # Correlations of independent streams are normal, of deviation 1 / sqrt(n): 5 of them in one case of a million.
    shifted = np.concatenate([streams, np.roll(streams[:1], 1, axis=1)])
    correlations = np.corrcoef(shifted)[np.triu_indices(len(shifted), 1)]
    assert abs(correlations).max() < 5 / math.sqrt(steps)
