"""Every op in NumPy and in plain torch against the float64 truth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, both, every_kind, numpy_kinds
from truth import Kind, check, rounded_once

import gpukernels
from gpukernels.cast import WIDENED
from gpukernels.numpy_ops.attention import _QUERIES as QUERIES
from gpukernels.numpy_ops.attention import _SCORES as SCORES
from gpukernels.numpy_ops.blocks import BLOCK
from gpukernels.verify.compare import host
from gpukernels.verify.truth import ACTIVATIONS, bound, true_attention

SHAPES = [(7,), (1, 64), (5, 1), (2, 3, 5), (31, 127), (0, 5), (2, 0, 5)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_kind
@every_shape
@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
def test_layer_norm(kind, shape, left_out):
    arrays = kind.draws(x=shape, weight=shape[-1:], bias=shape[-1:], residual=shape)
    for eps in (1e-5, 0.3):
        check("layer_norm", {name: arrays[name] for name in arrays if name not in left_out}, eps=eps)


@every_kind
@every_shape
def test_rms_norm(kind, shape):
    arrays = kind.draws(x=shape, weight=shape[-1:], residual=shape)
    for eps in (1e-5, 0.3):
        check("rms_norm", arrays, eps=eps)
        check("rms_norm", {name: arrays[name] for name in ("x", "weight")}, eps=eps)


@every_kind
@every_shape
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(kind, shape, activation):
    arrays = kind.draws(x=shape, weight=(11, shape[-1]), bias=(11,), residual=(*shape[:-1], 11))
    for left_out in ((), ("bias",), ("residual",), ("bias", "residual")):
        check("linear", {name: arrays[name] for name in arrays if name not in left_out}, activation=activation)


@every_kind
@every_shape
def test_norm_linear(kind, shape):
    width = shape[-1:]
    arrays = kind.draws(x=shape, norm_weight=width, norm_bias=width, weight=(13, *width), bias=(13,))
    check("norm_linear", arrays, eps=1e-3, activation="gelu_new")
    plain = gpukernels.norm_linear(arrays["x"], arrays["norm_weight"], None, arrays["weight"])
    zeros = {name: kind.array(np.zeros(len(arrays[name]))) for name in ("norm_bias", "bias")}
    np.testing.assert_array_equal(host(plain), host(gpukernels.norm_linear(**arrays | zeros)))
    y, x = gpukernels.norm_linear(**arrays | zeros, with_x=True)
    np.testing.assert_array_equal(host(y), host(plain))
    assert x is arrays["x"]


@every_kind
@every_shape
def test_norm_linear_with_an_rms_norm(kind, shape):
    width = shape[-1:]
    arrays = kind.draws(x=shape, norm_weight=width, weight=(13, *width), bias=(13,))
    for eps in (1e-6, 0.3):
        check("norm_linear", arrays, norm="rms", norm_bias=None, eps=eps, activation="silu")
    bare = {name: arrays[name] for name in ("x", "norm_weight", "weight")}
    y, x = gpukernels.norm_linear(**bare, norm_bias=None, norm="rms", eps=1e-6, with_x=True)
    h = gpukernels.rms_norm(arrays["x"], arrays["norm_weight"], eps=1e-6)
    np.testing.assert_array_equal(host(y), host(gpukernels.linear(h, arrays["weight"])))
    assert x is arrays["x"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "16" in kind.dtype], ids="-".join)
@pytest.mark.parametrize("product", [False, True], ids=["alone", "before a product"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_is_rounded_once(kind, product, norm):
    rounded_once(norm, kind, (50, 300), product=product)


@every_kind
def test_matmul(kind):
    for a, b in (((3, 5), (5, 7)), ((1, 1), (1, 1)), ((2, 3, 31, 17), (17, 4)), ((2, 3, 4, 5), (2, 3, 5, 6))):
        check("matmul", kind.draws(a=a, b=b))
        check("matmul", kind.draws(a=(*a[:-2], 0, a[-1]), b=b))


ATTENTION = {
    "square": ((2, 7, 3, 8), (7, 3), {}),
    "new after old": ((2, 3, 2, 5), (11, 2), {}),
    "one query": ((3, 1, 4, 8), (13, 4), {}),
    "one key": ((2, 1, 2, 4), (1, 2), {}),
    "all see all": ((2, 5, 2, 4), (9, 2), {"causal": False}),
    "more queries than keys": ((1, 5, 2, 4), (3, 2), {"causal": False}),
    "grouped heads": ((2, 5, 6, 4), (8, 3), {}),
    "one key head": ((2, 5, 4, 8), (5, 1), {}),
    "window of one": ((1, 6, 2, 4), (6, 2), {"window": 1}),
    "window": ((2, 7, 2, 4), (12, 1), {"window": 4}),
    "window of all": ((1, 7, 2, 4), (7, 2), {"window": 99}),
    "scale": ((1, 5, 2, 4), (5, 2), {"scale": 0.01}),
    "large scale": ((1, 5, 2, 4), (5, 2), {"scale": 7.5}),
    "lengths": ((5, 4, 2, 4), (9, 2), {"lengths": [9, 0, 3, 4, 5]}),
    "lengths and window": ((4, 4, 2, 4), (9, 1), {"lengths": [9, 0, 3, 5], "window": 2}),
    "lengths, all see all": ((4, 4, 2, 4), (9, 1), {"lengths": [9, 0, 3, 5], "causal": False}),
    "documents": ((2, 9, 2, 4), (9, 1), {"documents": [[3, 3, 3, 0, 0, 3, 3, 3, 3], [1] * 9]}),
    "documents, the last queries": ((2, 4, 4, 4), (9, 2), {"documents": [[0, 1, 2, 2, 2, 2, 3, 3, 4], [5] * 8 + [6]]}),
    "documents, all see all": ((1, 7, 2, 4), (9, 2), {"documents": [[7, 7, 1, 1, 1, 2, 1, 1, 1]], "causal": False}),
    "documents, lengths, window": (
        (3, 4, 2, 4),
        (6, 2),
        {"documents": [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6], "lengths": [6, 4, 2], "window": 2},
    ),
    "no rows": ((0, 4, 2, 4), (9, 2), {}),
    "no queries": ((2, 0, 2, 4), (9, 2), {}),
    "no keys": ((2, 3, 2, 4), (0, 2), {"lengths": [0, 0]}),
}


@every_kind
@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(kind, integer, case):
    (batch, new, heads, width), kv, options = ATTENTION[case]
    arrays = kind.draws(q=(batch, new, heads, width), k=(batch, *kv, width), v=(batch, *kv, width))
    integers = {name: kind.ints(options[name], integer) for name in ("lengths", "documents") if name in options}
    options = {name: options[name] for name in options if name not in integers}
    for return_lse in (False, True):
        check("attention", arrays | integers, **options, return_lse=return_lse)


@every_kind
@pytest.mark.parametrize("case", ["square", "grouped heads", "documents"])
def test_a_window_that_hides_nothing_is_none(kind, case):
    """It takes the same way through the code: Mistral's window is longer than most of what it reads."""
    (batch, new, heads, width), kv, options = ATTENTION[case]
    arrays = kind.draws(q=(batch, new, heads, width), k=(batch, *kv, width), v=(batch, *kv, width))
    arrays |= {name: kind.ints(of) for name, of in options.items()}
    for window in (kv[0], 4096):
        np.testing.assert_array_equal(
            host(gpukernels.attention(**arrays, window=window)), host(gpukernels.attention(**arrays))
        )


@every_kind
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 6e4])
@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_past_a_rows_length_is_not_read_and_padding_is_zero(kind, garbage, causal):
    lengths = [0, 1, 3, 6]
    arrays = kind.draws(q=(4, 4, 2, 4), k=(4, 8, 2, 4), v=(4, 8, 2, 4)) | {"lengths": kind.ints(lengths)}
    clean = host(gpukernels.attention(**arrays, causal=causal))
    for row, length in enumerate(lengths):
        arrays["k"][row, length:] = arrays["v"][row, length:] = garbage
        assert (clean[row, : max(0, 4 - length)] == 0).all()
        assert (clean[row, max(0, 4 - length) :] != 0).all()
    np.testing.assert_array_equal(host(gpukernels.attention(**arrays, causal=causal)), clean)


@every_kind
@pytest.mark.parametrize("dtype", [None, "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_embedding(kind, dtype, shape):
    random = np.random.default_rng(0)
    options = {"dtype": dtype if dtype is None or kind.arrays == "numpy" else getattr(torch, dtype)}
    options["result_dtype"] = dtype or kind.dtype
    arrays = {"ids": kind.ints(random.integers(0, 5, shape)), "weight": kind.draw(5, 3)}
    check("embedding", arrays, **options)
    arrays |= {"positions": kind.ints(random.integers(0, 7, shape), "int64"), "position_weight": kind.draw(7, 3)}
    check("embedding", arrays, **options)


around = pytest.mark.parametrize("step", [-1, 0, 1])


@numpy_kinds
@around
def test_around_a_block_of_elements(kind, step):
    rows = BLOCK // 64 + step
    check("layer_norm", kind.draws(x=(rows, 64), weight=(64,), bias=(64,), residual=(rows, 64)))
    check("linear", kind.draws(x=(rows, 3), weight=(64, 3), bias=(64,), residual=(rows, 64)), activation="relu")
    check("layer_norm", kind.draws(x=(3, BLOCK + step), weight=(BLOCK + step,)))


@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
@pytest.mark.parametrize(("outer", "inner"), [(3, WIDENED // 2), (2, WIDENED), (WIDENED // 64, 64)])
@around
def test_around_a_block_of_widened_weights(stored, outer, inner, step):
    weight = Kind("numpy", "float16").draw(*((outer, inner + step) if inner > 64 else (outer + step, inner)))
    weight = weight if stored == "(out, in)" else weight.T
    for rows in (1, 2):
        check("linear", {"x": Kind("numpy", "float32").draw(rows, weight.shape[1]), "weight": weight})


@numpy_kinds
@around
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"causal": False}], ids=str)
def test_around_a_block_of_queries(kind, step, options):
    arrays = kind.draws(q=(1, QUERIES + step, 1, 3), k=(1, QUERIES + 37, 1, 3), v=(1, QUERIES + 37, 1, 3))
    check("attention", arrays, **options)
    check("attention", arrays | {"lengths": kind.ints([QUERIES + step - 2])}, **options)  # two queries are padding


@numpy_kinds
@around
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3)])
def test_around_a_block_of_scores(kind, step, heads, kv_heads):
    queries = QUERIES // 4
    kv = (1, SCORES // (queries * heads // kv_heads) // 2 + step, kv_heads, 2)  # two heads at a time, or just not
    check("attention", kind.draws(q=(1, queries, heads, 2), k=kv, v=kv), causal=False)


@both
def test_large_values_in_float16(library):
    kind = Kind(library, "float16")
    large, row = kind.draw(3, 64, spread=1e4 / 4), kind.draw(64)  # to about 1e4
    check("layer_norm", {"x": large, "weight": row, "residual": large})
    check("layer_norm", {"x": kind.array(1e4 + 8.0 * np.arange(64)[None]), "weight": row})
    check("linear", {"x": large, "weight": kind.draw(5, 64, spread=1e-2), "residual": large[:, :5]}, activation="gelu")
    check("matmul", {"a": large, "b": kind.draw(64, 2, spread=1e-2)})
    check("attention", kind.draws(q=(1, 5, 1, 4), k=(1, 5, 1, 4)) | {"v": large[:1, :20].reshape(1, 5, 1, 4)})
    # Scores of 2**30 overflow float16; as sums of powers of two they are exact in float32.
    q, v = (kind.draw(2, 9, 2, 64, seed=seed) for seed in range(2))
    q = kind.array(8192 * (host(q) > 0) - 4096)
    error = abs(host(gpukernels.attention(q, q, v)) - true_attention(host(q), host(q), host(v)).value)
    assert (error <= bound("float16", 9, abs(host(v)).max())).all()


sizes, seeds = st.integers(1, 9), st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(new=sizes, old=sizes, data=st.data(), seed=seeds)
def test_a_later_key_changes_no_bit_of_an_earlier_query(new, old, data, seed):
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((2, size, 2, 4), np.float32) for size in (new, old + new, old + new))
    changed = data.draw(st.integers(old, old + new - 1))
    before = gpukernels.attention(q, k, v)
    k[:, changed:], v[:, changed:] = random.standard_normal((2, 1)), 1e3
    after = gpukernels.attention(q, k, v)
    assert after[:, : changed - old].tobytes() == before[:, : changed - old].tobytes()
    assert (after[:, changed - old] != before[:, changed - old]).any()


@settings(max_examples=60, deadline=None)
@given(new=sizes, old=sizes, groups=st.integers(1, 4), split=sizes, seed=seeds)
def test_grouped_heads_splits_and_permutations(new, old, groups, split, seed):
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((3, *size, 4)) for size in ((new, 2 * groups), (old + new, 2), (old + new, 2)))
    lengths = np.array([old + new, old, max(1, old + new - split)], np.int32)
    whole = gpukernels.attention(q, k, v, lengths=lengths)
    limit = bound("float64", 4 + old + new, true_attention(q, k, v, lengths=lengths).magnitude)
    repeated = gpukernels.attention(q, k.repeat(groups, 2), v.repeat(groups, 2), lengths=lengths)
    assert (abs(repeated - whole) <= limit).all()
    order = random.permutation(3)
    permuted = gpukernels.attention(q[order], k[order], v[order], lengths=lengths[order])
    np.testing.assert_array_equal(permuted, whole[order])
    split = min(split, new)
    first = gpukernels.attention(q[:, :split], k, v, lengths=np.maximum(lengths - (new - split), 0))
    second = gpukernels.attention(q[:, split:], k, v, lengths=lengths)
    assert (abs(np.concatenate((first, second), 1) - whole) <= limit).all()


@both
def test_a_whole_number_may_be_numpys(library):
    kind = Kind(library, "float32")
    arrays = kind.draws(q=(1, 5, 2, 8), k=(1, 5, 2, 8), v=(1, 5, 2, 8))
    check("attention", arrays, window=np.int64(2))
    hidden, weight, targets = kind.draw(6, 8), kind.draw(11, 8), kind.ints(np.arange(6))
    options = {"chunk": np.int32(4), "ignore_index": np.int64(3)}
    plain = gpukernels.linear_cross_entropy(hidden, weight, targets, chunk=4, ignore_index=3)
    assert host(gpukernels.linear_cross_entropy(hidden, weight, targets, **options)) == host(plain)


def test_attention_with_lengths_is_differentiable_twice_on_the_cpu():
    """Without a gradient torch's own attention computes it, which is not."""

    def penalty(dtype):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 5, 2, 4, generator=generator).to(dtype).requires_grad_() for _ in "qkv")
        out = gpukernels.attention(q, k, v, lengths=torch.tensor([5, 3]), window=2)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in gradients), (q, k, v))

    for found, want in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
