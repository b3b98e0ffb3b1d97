"""Attention, forward and backward: every path through the blocks, by pointers and by descriptors, against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DOT_KINDS, HALF, SINGLE, check_gradients, ids
from truth import check

import gpukernels
from gpukernels.kernels import device
from gpukernels.kernels.attention import backward, blocks, forward
from gpukernels.kernels.device import INTERPRETING
from gpukernels.kernels.tiles import AttentionTile
from gpukernels.library.attention import WIDEST
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

kinds = pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request, monkeypatch):
    """With descriptors where the dtype and the strides allow them, and without any."""
    usual = device.gpu()
    if request.param == "descriptors" and not (INTERPRETING or usual.takes_descriptors):
        pytest.skip("this GPU takes no tensor descriptors")
    hopper = usual._replace(capability=90) if request.param == "descriptors" else usual._replace(capability=80)
    monkeypatch.setattr(blocks, "gpu", lambda: hopper)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16 queries and 16 or 32 keys, so that small inputs have several of each."""

    def tile(width, keys):
        return AttentionTile(16, keys, max(16, 1 << (width - 1).bit_length()), 4, 1)

    monkeypatch.setattr(forward, "attention_forward_tile", lambda width, size, tma, small: tile(width, 32))
    monkeypatch.setattr(
        backward, "attention_backward_tiles", lambda width, size, tma: (tile(width, 16), tile(width, 32))
    )


def arrays(kind, batch, new, heads, width, keys, kv_heads, **integers):
    given = kind.draws(q=(batch, new, heads, width), k=(batch, keys, kv_heads, width), v=(batch, keys, kv_heads, width))
    return given | {name: kind.ints(values) for name, values in integers.items()}


def check_both(given, **options):
    check("attention", given, **options)
    check_gradients("attention", given, **options)


# Blocks of 16 queries and 16 or 32 keys: one below, at and above each; heads that share keys; one of each.
SIZES = {
    "one": (1, 1, 1, 16, 1, 1),
    "one query": (2, 1, 2, 16, 33, 2),
    "below a block": (1, 15, 2, 16, 15, 1),
    "a block": (1, 16, 1, 16, 16, 1),
    "above a block": (1, 17, 1, 16, 17, 1),
    "two blocks of keys": (1, 32, 1, 16, 64, 1),
    "primes": (1, 37, 3, 16, 71, 1),
    "more queries than a block, few keys": (2, 33, 4, 16, 35, 2),
}
OPTIONS = {
    "causal": {},
    "all see all": {"causal": False},
    "window of one": {"window": 1},
    "window": {"window": 20},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("small_tiles")
def test_sizes(size, options, loads):
    check_both(arrays(HALF, *SIZES[size]), **OPTIONS[options])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("small_tiles")
def test_sizes_in_float32(size):
    check_both(arrays(SINGLE, *SIZES[size]), window=20)


@kinds
@pytest.mark.parametrize("options", ["causal", "all see all", "window"])
@pytest.mark.usefixtures("small_tiles")
def test_lengths(kind, options, loads):
    lengths = [0, 1, 16, 33, 37, 50]
    given = arrays(kind, 6, 37, 2, 16, 50, 1, lengths=lengths)
    for row, length in enumerate(lengths):  # what lies behind must not be read, or must not count
        given["k"][row, length:] = given["v"][row, length:] = math.nan
    check("attention", given, **OPTIONS[options], return_lse=True)
    check_gradients("attention", given, **OPTIONS[options])


@kinds
@pytest.mark.parametrize("options", ["causal", "all see all", "window"])
@pytest.mark.usefixtures("small_tiles")
def test_documents(kind, options, loads):
    # Borders inside blocks, at them, and documents of one token; the second row is one document.
    runs = [3, 13, 1, 1, 30, 16, 7]
    documents = [np.repeat([5, 0, 5, 1, 0, 2, 9], runs), np.full(71, 4)]
    check_both(arrays(kind, 2, 71, 2, 16, 71, 1, documents=documents), **OPTIONS[options])
    tail = arrays(kind, 2, 20, 1, 16, 71, 1, documents=documents, lengths=[66, 71])
    check_both(tail, **OPTIONS[options])


@kinds
@pytest.mark.parametrize("width", [16, 24, 64, 80, 128])
def test_head_widths_with_the_real_tiles(kind, width, loads):
    check_both(arrays(kind, 1, 70, 2, width, 70, 1))


@pytest.mark.parametrize("kind", [HALF, SINGLE], ids=ids)
def test_the_widest_heads_and_wider_ones(kind, loads):
    check_both(arrays(kind, 1, 20, 1, 256, 40, 1))
    check_both(arrays(kind, 1, 3, 1, WIDEST + 8, 5, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_any_strides(layout, loads):
    given = arrays(HALF, 2, 20, 4, 16, 33, 2)
    laid_out = {name: LAYOUTS[layout](x) for name, x in given.items()}
    check("attention", laid_out)
    check_gradients("attention", laid_out, layout=layout)


@pytest.mark.parametrize("window", [33, 2**31 - 1, 2**40])
@pytest.mark.usefixtures("small_tiles")
def test_a_window_wider_than_the_keys_hides_nothing(window, loads):
    """A position plus the widest window of 32 bits is more than 32 bits hold."""
    given = arrays(HALF, 1, 20, 2, 16, 33, 2)
    check_both(given, window=window)
    out, lse = gpukernels.attention(**given, window=window, return_lse=True)
    every = gpukernels.attention(**given, return_lse=True)
    assert torch.equal(out, every[0])
    assert torch.equal(lse, every[1])


@pytest.mark.usefixtures("small_tiles")
def test_packed_queries_keys_and_values(loads):
    packed = HALF.draw(2, 20, 3, 2, 16)
    given = dict(zip("qkv", packed.unbind(2), strict=True))
    before = packed.clone()
    check_both(given)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("options", ["causal", "window", "documents"])
@pytest.mark.usefixtures("small_tiles")
def test_packed_attention_is_that_of_its_thirds_bit_for_bit(loads, options, monkeypatch):
    qkv, dout = HALF.draw(3, 37, 3, 2, 16).requires_grad_(), HALF.draw(3, 37, 2, 16, seed=1)
    options = OPTIONS.get(options, {"documents": HALF.ints(np.arange(111).reshape(3, 37) // 8)})
    thirds = gpukernels.attention(*qkv.unbind(2), **options)
    wanted = thirds, *torch.autograd.grad(thirds, qkv, dout)
    for most in (3, 2):  # rows of a launch
        monkeypatch.setattr(blocks, "MOST_ROWS", most)
        packed = gpukernels.packed_attention(qkv, **options)
        found = packed, *torch.autograd.grad(packed, qkv, dout)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_packed_heads_that_are_wider_than_the_kernels_run_plain_torch():
    check_gradients("packed_attention", {"qkv": SINGLE.draw(1, 3, 3, 1, WIDEST + 1)})


@pytest.mark.parametrize("size", [(0, 4, 2, 16, 9, 2), (2, 0, 2, 16, 9, 2), (2, 3, 2, 16, 0, 2)], ids=str)
def test_nothing(size, loads):
    lengths = {"lengths": [0, 0]} if size[4] == 0 else {}
    given = arrays(SINGLE, *size, **lengths)
    check("attention", given, return_lse=True)
    leaves = {name: x.requires_grad_() for name, x in given.items() if name != "lengths"}
    gpukernels.attention(**given).sum().backward()
    assert all((x.grad == 0).all() for x in leaves.values())


@pytest.mark.usefixtures("small_tiles")
def test_the_gradient_of_the_log_sum_exp(loads):
    given = arrays(SINGLE, 1, 20, 2, 16, 33, 1)
    check_gradients("attention", given, return_lse=True)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    _, lse = gpukernels.attention(**leaves, return_lse=True)
    found = torch.autograd.grad(lse.sum(), [leaves["q"], leaves["v"]])
    # d lse / d q is the keys' mean under the softmax, whoever computes it; v has no part in it.
    mean, _ = gpukernels.attention(given["q"], given["k"], given["k"], return_lse=True)
    torch.testing.assert_close(found[0], mean * 16**-0.5, rtol=1e-4, atol=1e-5)
    assert not found[1].any()


@pytest.mark.parametrize("needs", ["q", "kv", "v"])
def test_only_the_gradients_that_are_asked_for(needs):
    given = arrays(SINGLE, 1, 5, 2, 16, 7, 1)
    every = {name: x.clone().requires_grad_() for name, x in given.items()}
    some = {name: x.clone().requires_grad_(name in needs) for name, x in given.items()}
    for leaves in (every, some):
        y = gpukernels.attention(**leaves)
        y.backward(torch.ones_like(y))
    for name in given:
        assert some[name].grad is None if name not in needs else torch.equal(some[name].grad, every[name].grad)


@pytest.mark.usefixtures("small_tiles")
def test_the_same_bits_every_time_and_whatever_the_neighbours(loads):
    given = {name: x.requires_grad_() for name, x in arrays(HALF, 3, 37, 4, 16, 37, 2).items()}
    runs = []
    for _ in range(2):
        out, lse = gpukernels.attention(**given, return_lse=True)
        runs.append([out, lse, *torch.autograd.grad(out, list(given.values()), torch.ones_like(out))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    alone = {name: x.detach()[1:2].requires_grad_() for name, x in given.items()}
    out, lse = gpukernels.attention(**alone, return_lse=True)
    found = [out, lse, *torch.autograd.grad(out, list(alone.values()), torch.ones_like(out))]
    assert all(torch.equal(one[0], all_rows[1]) for one, all_rows in zip(found, runs[0], strict=True))


@settings(max_examples=8, deadline=None)
@given(new=st.integers(1, 40), old=st.integers(0, 40), data=st.data())
def test_a_later_key_changes_nothing_bit_for_bit(new, old, data):
    given = arrays(SINGLE, 1, new, 1, 16, old + new, 1)
    changed = data.draw(st.integers(old, old + new - 1))
    before = gpukernels.attention(**given)
    given["k"][:, changed:], given["v"][:, changed:] = 3.0, 1e3
    after = gpukernels.attention(**given)
    assert torch.equal(after[:, : changed - old], before[:, : changed - old])
    assert (after[:, changed - old] != before[:, changed - old]).any()


def test_heads_that_share_keys_are_those_with_copies(loads):
    given = arrays(HALF, 1, 20, 6, 16, 20, 2)
    copies = {name: x if name == "q" else x.repeat_interleave(3, 2) for name, x in given.items()}
    assert torch.equal(gpukernels.attention(**given), gpukernels.attention(**copies))


def test_large_scores_in_float16(loads):
    given = arrays(HALF, 1, 20, 1, 64, 20, 1)
    given = given | {name: given[name] * 40 for name in "qk"}  # scores of thousands
    out = host(gpukernels.attention(**given))
    assert np.isfinite(out).all()
    check("attention", given)


def test_the_bounds_of_documents():
    from gpukernels.kernels.attention.blocks import document_bounds

    for size in (1, 7, 1024, 1025, 2500):
        random = np.random.default_rng(size)
        documents = random.integers(0, 2, (2, size)).cumsum(1) // 3
        starts = [[min(np.flatnonzero(row == value)) for value in row] for row in documents]
        ends = [[max(np.flatnonzero(row == value)) + 1 for value in row] for row in documents]
        found = document_bounds(SINGLE.ints(documents, "int64"))
        assert host(found).tolist() == np.stack([starts, ends], 1).tolist()


def test_more_rows_than_a_grid_has_are_launched_in_parts(small_tiles, monkeypatch):
    given = arrays(HALF, 5, 20, 2, 16, 20, 2, lengths=[20, 7, 0, 16, 1], documents=np.arange(100).reshape(5, 20) // 6)
    leaves = [given[name].requires_grad_() for name in "qkv"]

    def results():
        out, lse = gpukernels.attention(**given, return_lse=True)
        return out, lse, *torch.autograd.grad([out, lse[0, 0]], leaves, [out, lse[0, 0]])

    whole = results()
    monkeypatch.setattr(blocks, "MOST_ROWS", 2)
    for in_parts, at_once in zip(results(), whole, strict=True):
        assert torch.equal(in_parts, at_once)
