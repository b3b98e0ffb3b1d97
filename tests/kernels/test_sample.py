"""The sampling kernel makes the choice that NumPy makes, in every row, always: no tolerance."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF, KINDS, ids
from sampling_cases import mixed, on

from gpukernels import numpy_ops, sample
from gpukernels.kernels import sampling
from gpukernels.kernels.device import INTERPRETING
from gpukernels.numpy_ops.sampling import candidates
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

ROWS = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCK", 16)


def device(options):
    return {name: on("torch", x, DEVICE) for name, x in options.items()}


def check(logits, **options):
    got = sample(on("torch", logits, DEVICE), **device(options))
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(host(got), numpy_ops.sample(logits, **options))


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 32, 33])
def test_every_option_on_and_off_by_row(size):
    logits, options = mixed(size, ROWS, size)
    check(logits, **options)


@pytest.mark.parametrize(
    "left_out", [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p"), ("repetition_penalty", "seen")]
)
def test_options_left_out_for_all(left_out):
    logits, options = mixed(1, ROWS, 35)
    check(logits, **{name: x for name, x in options.items() if name not in left_out})


@pytest.mark.parametrize("bits", [np.int32, np.int64])
def test_seeds(bits):
    logits, options = mixed(2, ROWS, 20)
    del options["uniforms"]
    random, most = np.random.default_rng(0), np.iinfo(bits).max
    numbers = {name: random.integers(-most, most, ROWS).astype(bits) for name in ("seed", "stream", "step")}
    options |= numbers | {"temperature": np.full(ROWS, 2, np.float32), "top_k": options["top_k"].astype(bits)}
    check(logits, **options)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_stride(kind, layout):
    logits, options = mixed(3, 4, 39)
    given = kind.array(logits)
    want = numpy_ops.sample(host(given).astype(np.float32), **options)
    options = device(options)
    if layout != "contiguous":
        wide = torch.ones(8, 50, dtype=torch.bool, device=DEVICE)
        wide[::2, 5:44] = options["seen"]
        options = {name: x.repeat_interleave(2)[::2] for name, x in options.items() if name != "seen"}
        options["seen"] = wide[::2, 5:44]
    if layout == "transposed":
        options["seen"] = options["seen"].T.contiguous().T
    np.testing.assert_array_equal(host(sample(LAYOUTS[layout](given), **options)), want)


def test_options_of_half_precision():
    """float16 holds no 2^24, in units of which a draw is made."""
    logits, options = mixed(3, ROWS, 35)
    options = {name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in options.items()}
    options["temperature"] = np.maximum(options["temperature"], np.float16(0.1))
    options["uniforms"] = np.linspace(0, 0.99, ROWS, dtype=np.float16)
    wide = {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in options.items()}
    want = numpy_ops.sample(logits, **wide)
    assert len(set(want)) > 2
    np.testing.assert_array_equal(numpy_ops.sample(logits, **options), want)
    np.testing.assert_array_equal(host(sample(on("torch", logits, DEVICE), **device(options))), want)


def test_greedy_takes_the_lowest_id_of_the_best():
    logits = np.random.default_rng(0).integers(0, 4, (40, 50)).astype(np.float32)
    logits[0], logits[1, ::2] = -0.0, -0.0
    logits[1, 1::2] = 0.0
    check(logits)
    check(logits, temperature=np.zeros(40, np.float32), uniforms=np.full(40, np.nan, np.float32))


@pytest.mark.parametrize("where", [0, 20, 34])
def test_a_row_that_overflowed_is_minus_one_and_its_neighbours_are_not(where):
    logits, options = mixed(4, 6, 35)
    bad = np.array([np.nan, -np.nan, np.inf], np.float32)
    logits[[0, 2, 4], where] = bad
    logits[5] = -np.inf
    options["seen"][:, where] = False
    got = host(sample(on("torch", logits, DEVICE), **device(options)))
    np.testing.assert_array_equal(got == -1, [True, False, True, False, True, True])
    check(logits, **options)
    check(logits)


def test_with_the_block_as_it_is(monkeypatch):
    monkeypatch.undo()
    for size in (sampling._BLOCK - 1, 2 * sampling._BLOCK + 7):
        logits, options = mixed(6, 3, size)
        options["temperature"][:] = 1
        check(logits, **options)


@pytest.mark.parametrize("threshold", ["top_k", "top_p"])
def test_a_threshold_keeps_exactly_what_it_should(threshold):
    """Each row keeps one token more than the one before it, and the last uniform number draws the last of them."""
    size = 18
    logits = np.tile(-0.1 * np.arange(size, dtype=np.float32), (size, 1))
    weights = np.exp(-0.1 * np.arange(size))
    enough = (np.cumsum(weights) - weights / 2) / weights.sum()  # half-way through each token
    options = {"temperature": np.ones(size, np.float32), "uniforms": np.full(size, 1 - 2**-24, np.float32)}
    options[threshold] = np.arange(1, size + 1) if threshold == "top_k" else enough.astype(np.float32)
    got = sample(on("torch", logits, DEVICE), **device(options))
    np.testing.assert_array_equal(host(got), np.arange(size))


def test_draws_on_both_sides_of_an_edge():
    """The two numbers between which the choice changes: the last bits of the weights decide where that is."""
    random, rows = np.random.default_rng(8), 12
    logits = random.standard_normal((rows, 20)).astype(np.float32)
    temperature = random.uniform(0.5, 2, rows).astype(np.float32)
    edges = []
    for x, t in zip(logits, temperature, strict=True):
        sums = np.cumsum(candidates(x, t)[1])
        edges.append(-(-int(sums[9]) * 2**24 // int(sums[-1])))
    for side in (0, 1):
        check(logits, temperature=temperature, uniforms=np.array([edge - side for edge in edges], np.float32) / 2**24)


def test_values_outside_their_ranges():
    logits, options = mixed(9, 6, 30)
    options["temperature"][:] = [1, 1, 1, 1, -1, 1]
    options["uniforms"][:] = [1.5, 1, -1, 0.5, 0.5, 0.5]
    options["min_p"][:] = [0, 0, 0, 2, 0, -1]
    options["top_p"][:] = [-1, 1, 7, 1, 1, 1]
    options["top_k"][:] = [0, -5, 0, 0, 0, 0]
    check(logits, **options)
    options["temperature"][:] = [1, 1, 1, 1, np.inf, np.nan]
    for name in ("uniforms", "min_p", "top_p"):
        check(logits, **options | {name: np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, 0.5], np.float32)})


def test_ties_fill_the_vocabulary():
    """No search can tell the tokens apart: all are kept, and the draw divides them evenly."""
    rows, size = 6, 40
    draws = np.arange(rows, dtype=np.float32) / rows
    options = {"temperature": np.ones(rows, np.float32), "uniforms": draws}
    options |= {"top_k": np.full(rows, 3), "top_p": np.full(rows, 0.2, np.float32)}
    check(np.full((rows, size), -7, np.float32), **options)
    got = sample(on("torch", np.full((rows, size), -7, np.float32), DEVICE), **device(options))
    np.testing.assert_array_equal(host(got), (draws.astype(np.float64) * size + 1e-4).astype(int))


def test_the_same_every_time_and_whatever_the_neighbours():
    logits, options = mixed(7, 8, 33)
    given, numbers = HALF.array(logits), device(options)
    together = sample(given, **numbers)
    assert torch.equal(sample(given, **numbers), together)
    for row in (0, 5):
        alone = sample(given[row : row + 1], **{name: x[row : row + 1] for name, x in numbers.items()})
        assert torch.equal(alone, together[row : row + 1])
    assert sample(given[:0], **{name: x[:0] for name, x in numbers.items()}).shape == (0,)


@pytest.mark.skipif(DEVICE != "cuda", reason="too much for an interpreter")
def test_the_largest_vocabulary_does_not_overflow_the_sums(monkeypatch):
    monkeypatch.undo()
    x, one = torch.zeros(1, 2**22, device=DEVICE), torch.ones(1, device=DEVICE)
    assert sample(x, temperature=one, uniforms=one - 2**-24, top_p=0.999 * one).item() == 2**22 - 1


@pytest.mark.skipif(not INTERPRETING, reason="passes are counted in the interpreter")
@pytest.mark.parametrize(
    ("option", "most"), [({"top_k": 50}, (1, 12, 0)), ({"top_p": 0.9}, (3, 0, 18))], ids=["top-k", "top-p"]
)
def test_a_search_takes_few_passes(monkeypatch, option, most):
    """float16 has few distances, and many tokens at each: halving integers alone takes 31 passes.

    Whole weights are dear, and made in three passes at most: of all, and on both sides of where the exponentials end.
    """
    total, passes = sampling._total, []

    def counted(*arguments):
        passes.append(arguments[-1])
        return total(*arguments)

    monkeypatch.setattr(sampling, "_BLOCK", 4096)
    monkeypatch.setattr(sampling, "_total", counted)
    logits = np.random.default_rng(0).standard_normal((1, 20_000)).astype(np.float16)
    (name, value) = option.copy().popitem()
    value = np.array([value], np.int32 if name == "top_k" else np.float32)
    check(logits, temperature=np.ones(1, np.float32), uniforms=np.array([0.5], np.float32), **{name: value})
    kinds = [getattr(kind, "value", kind) for kind in passes]
    found = [kinds.count(each.value) for each in (sampling._WEIGHT, sampling._ONE, sampling._NEARLY)]
    assert all(1 <= count <= limit or count == limit == 0 for count, limit in zip(found, most, strict=True)), found


@pytest.mark.skipif(not INTERPRETING, reason="the kernel's own function is replaced")
@pytest.mark.parametrize("off", [0.5, 0.98, 1.02, 2.0])
def test_exponentials_that_are_off_only_cost_passes(monkeypatch, off):
    exp2 = sampling.tl.exp2
    monkeypatch.setattr(sampling.tl, "exp2", lambda x: exp2(x * off))
    logits, options = mixed(5, ROWS, 60)
    options["temperature"][:], options["top_k"][:] = 1, 0
    for top_p in (0.3, 0.9, 0.99):
        check(logits, **options | {"top_p": np.full(ROWS, top_p, np.float32)})
