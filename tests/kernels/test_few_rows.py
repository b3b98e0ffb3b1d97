"""The product of few rows: every path by shape, every prologue and epilogue, against float64."""

import importlib
import math

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, HALF, SINGLE, ids
from truth import check as check_public

import gpukernels
from gpukernels.kernels import few_rows as kernels
from gpukernels.kernels.device import INTERPRETED, Gpu
from gpukernels.kernels.few_rows import FewRowsTile, few_rows_tile
from gpukernels.library.few_rows import few_rows
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS
from gpukernels.verify.truth import ACTIVATIONS, Truth, bound, true_layer_norm, true_linear, true_rms_norm

kinds = pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)

# Rows pass 8 at a time; a program has 8 rows of the weight, or 16 where there are 16 for each of 3
# multiprocessors; 8 warps have 256 elements of K in a piece, and 16 warps 512.
SHAPES = [
    (1, 1, 1), (1, 8, 32), (2, 7, 31), (3, 9, 33), (7, 17, 255), (8, 16, 256), (9, 15, 257), (16, 24, 40),
    (17, 47, 511), (5, 48, 512), (2, 49, 513), (64, 50, 24), (65, 5, 7), (0, 5, 7), (3, 0, 5), (1, 3, 1280),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def tiles_of_a_small_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "gpu", lambda: INTERPRETED)


def arrays(kind, M, N, K, *, norm=True):
    given = kind.draws(x=(M, K), weight=(N, K), bias=(N,), residual=(M, N), norm_weight=(K,), norm_bias=(K,))
    return given if norm else {name: x for name, x in given.items() if not name.startswith("norm")}


def run(x, weight, bias=None, residual=None, norm_weight=None, norm_bias=None, *, eps=1e-5, center=True, **options):
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps, center)
    return few_rows(x, weight, bias, residual=residual, norm=norm, **options)


def truth(x, weight, bias=None, residual=None, norm_weight=None, norm_bias=None, *, eps=1e-5, center=True, **options):
    size = abs(x)
    if norm_weight is not None:
        if center:
            norm = true_layer_norm(x, norm_weight, norm_bias, eps=eps)
        else:
            norm = true_rms_norm(x, norm_weight, eps=eps)
            if norm_bias is not None:
                norm = Truth(norm.value + norm_bias, norm.magnitude + abs(norm_bias), norm.length)
        x, size = norm.value, norm.magnitude + abs(norm.value)
    return true_linear(x, weight, bias, residual=residual, x_magnitude=size, **options)


def check(given, **options):
    before = {name: host(array) for name, array in given.items()}
    y = run(**given, **options)
    for name, array in given.items():
        np.testing.assert_array_equal(host(array), before[name], err_msg=f"{name} was changed")
    want = truth(**before, **options)
    assert y.dtype == given["x"].dtype
    assert tuple(y.shape) == want.value.shape
    error = abs(host(y) - want.value)
    limit = bound(str(y.dtype).removeprefix("torch."), want.length, want.magnitude)
    assert (error <= limit).all(), f"off by {np.nanmax(error / limit)} times the bound"


@kinds
@shapes
def test_the_product_alone(kind, shape):
    given = arrays(kind, *shape, norm=False)
    check({name: given[name] for name in ("x", "weight")})


@kinds
@shapes
@pytest.mark.parametrize("center", [True, False], ids=["layer norm", "rms norm"])
def test_everything_fused(kind, shape, center):
    check(arrays(kind, *shape), center=center, activation="gelu_new", eps=0.3)


@kinds
@pytest.mark.parametrize("left_out", ["bias", "residual", "norm_bias", "norm_weight"])
@pytest.mark.parametrize("center", [True, False], ids=["layer norm", "rms norm"])
def test_without_one_of_the_arguments(kind, left_out, center):
    given = {
        name: x for name, x in arrays(kind, 3, 20, 40).items() if not name.startswith(left_out.removesuffix("_weight"))
    }
    check(given, center=center)


@kinds
@activations
def test_activations(kind, activation):
    given = arrays(kind, 3, 20, 40, norm=False)
    check(given, activation=activation)
    check({name: given[name] for name in ("x", "weight")}, activation=activation)


@activations
def test_activations_at_their_ends(activation):
    z = torch.tensor([-6e4, -100, -1, -0.25, -1e-3, 0, 1e-6, 1e-3, 0.2499, 0.25, 1, 20, 100, 6e4], device=DEVICE)
    y = few_rows(z[:, None], torch.ones(1, 1, device=DEVICE), activation=activation)
    want = np.array([ACTIVATIONS[activation](value) for value in host(z)])
    np.testing.assert_allclose(host(y)[:, 0], want, rtol=2e-6, atol=1e-30)


def wide(kind):
    """K just up to and just past what 8 warps hold, what they hold beside a norm, what 16 hold; several passes."""
    size = kind.array(0.0).element_size()
    held, normed, most = kernels._HELD[8] // size, kernels._HELD_NORMED[size] // size, kernels._HELD[16] // size
    return [held, held + 1, normed, normed + 1, most, most + 1, 2 * most + 77]


@kinds
@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_long_rows(kind, which, norm):
    K = wide(kind)[which]
    given = arrays(kind, 9, 10, K, norm=norm is not None)
    given = {name: x for name, x in given.items() if norm != "rms" or name != "norm_bias"}
    check(given, center=norm != "rms", activation="silu")


def test_the_tile_is_of_the_weight_and_the_device(monkeypatch):
    h100 = Gpu(capability=90, multiprocessors=132)
    monkeypatch.setattr(kernels, "gpu", lambda: h100)
    # GPT-2: QKV, projection, up, down, unembedding.
    assert few_rows_tile(2304, 768, 2, norm=True) == FewRowsTile(16, 8, 3, 1, True)
    assert few_rows_tile(768, 768, 2, norm=False) == FewRowsTile(8, 8, 3, 1, False)
    assert few_rows_tile(3072, 768, 2, norm=True) == FewRowsTile(16, 8, 3, 1, True)
    assert few_rows_tile(768, 3072, 2, norm=False) == FewRowsTile(8, 16, 2, 1, False)
    assert few_rows_tile(50304, 768, 2, norm=True) == FewRowsTile(16, 8, 3, 1, False)
    # LLaMA's, whose norm has no bias: of TinyLlama, Llama 3.2 3B and 7B.
    assert few_rows_tile(2560, 2048, 2, norm=True, rms=True) == FewRowsTile(16, 8, 3, 1, True)
    assert few_rows_tile(2560, 2048, 2, norm=True) == FewRowsTile(8, 8, 3, 2, False)
    assert few_rows_tile(11264, 2048, 2, norm=True, rms=True) == FewRowsTile(8, 8, 3, 2, False)
    assert few_rows_tile(5120, 3072, 2, norm=True, rms=True) == FewRowsTile(8, 8, 3, 3, False)
    assert few_rows_tile(12288, 4096, 2, norm=True, rms=True) == FewRowsTile(8, 8, 3, 4, False)
    # Passes where the registers end, or where 16 warps would come to a multiprocessor twice.
    assert few_rows_tile(1600, 6400, 2, norm=False) == FewRowsTile(8, 8, 3, 7, False)
    assert few_rows_tile(1280, 5120, 2, norm=False) == FewRowsTile(8, 8, 3, 5, False)
    assert few_rows_tile(1024, 4096, 2, norm=False) == FewRowsTile(8, 16, 2, 1, False)
    assert few_rows_tile(768, 3072, 4, norm=False) == FewRowsTile(8, 8, 1, 6, False)
    # In float32 a norm stays in the prologue up to GPT-2 XL, but not before the unembedding.
    for C in (1024, 1280, 1600):
        for N in (3 * C, 4 * C):
            for rms in (False, True):
                assert few_rows_tile(N, C, 4, norm=True, rms=rms) == FewRowsTile(8, 8, 1, 1, True)
            assert few_rows_tile(N, C, 4, norm=False) == FewRowsTile(8, 8, 1, -(-C // 512), False)
        assert not few_rows_tile(50304, C, 4, norm=True).fused
    for N in (1, 8, 50, 768, 50304):
        for K in (0, 1, 31, 768, 1664, 1665, 4096, 4097, 50000):
            for size in (2, 4):
                tile = few_rows_tile(N, K, size, norm=True)
                held = kernels._PASS if tile.PASSES > 1 else kernels._HELD[tile.num_warps]
                assert math.ceil(K / tile.PASSES) * size <= held


@kinds
@pytest.mark.parametrize("N", [191, 192, 193, 208])
def test_a_norm_in_the_prologue_or_on_its_own(kind, N):
    # 16 rows of the weight each, 4 programs on each of 3 multiprocessors: to 192.
    assert few_rows_tile(N, 40, 2, norm=True).fused == (N <= 192)
    check(arrays(kind, 2, N, 40))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 24, 40), (3, 10, 4099)], ids=str)
def test_any_strides(layout, shape):
    given = arrays(HALF, *shape)
    check({name: LAYOUTS[layout](x) if x.ndim > 1 else x for name, x in given.items()})
    strided = {name: x.repeat_interleave(2)[::2] if x.ndim == 1 else x for name, x in given.items()}
    check(strided)


def test_more_dimensions_and_none():
    given = arrays(HALF, 6, 10, 40)
    want = run(**given)
    folded = given | {"x": given["x"].view(2, 3, 40), "residual": given["residual"].view(2, 3, 10)}
    assert torch.equal(run(**folded), want.view(2, 3, 10))
    one = given | {"x": given["x"][4], "residual": given["residual"][4]}
    assert torch.equal(run(**one), want[4])


def test_no_columns_at_all_give_the_bias():
    x, weight, bias = (HALF.draw(*shape) for shape in ((3, 0), (10, 0), (10,)))
    assert torch.equal(few_rows(x, weight, bias), bias.expand(3, 10))


CASES = {"one program": (64, 20, 300), "norm on its own": (64, 200, 40), "passes": (64, 5, 6200)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("center", [True, False], ids=["layer norm", "rms norm"])
def test_a_row_has_the_same_bits_in_every_batch(case, center):
    given = arrays(HALF, *CASES[case])
    options = {"center": center, "activation": "gelu"}
    every = run(**given, **options)
    assert torch.equal(run(**given, **options), every)

    def rows(chosen):
        return run(**given | {name: given[name][chosen] for name in ("x", "residual")}, **options)

    for M in (1, 2, 3, 8, 16, 17):
        assert torch.equal(rows(slice(M)), every[:M])
    for row in (0, 1, 7, 8, 40, 63):
        assert torch.equal(rows(slice(row, row + 1))[0], every[row])
    # Not even neighbours that are not numbers.
    others = given["x"].clone()
    others[torch.arange(64, device=DEVICE) % 3 > 0] = torch.nan
    assert torch.equal(run(**given | {"x": others}, **options)[::3], every[::3])


def whole(kind, *shape, seed=0):
    """Small whole numbers, whose products and sums are exact in float32."""
    return kind.array(np.random.default_rng([seed, *shape]).integers(-3, 4, shape))


@kinds
@pytest.mark.parametrize("shape", [*SHAPES, (9, 10, 1700), (3, 10, 8300)], ids=str)
def test_whole_numbers_are_exact(kind, shape):
    M, N, K = shape
    x, weight, bias, residual = (whole(kind, *s, seed=i) for i, s in enumerate([(M, K), (N, K), (N,), (M, N)]))
    want = torch.from_numpy(np.maximum(host(x) @ host(weight).T + host(bias), 0) + host(residual)).to(DEVICE)
    y = few_rows(x, weight, bias, residual=residual, activation="relu")
    assert torch.equal(y, want.to(y.dtype))


def test_only_the_result_is_rounded():
    x = torch.full((1, 64), 60000.0, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(3, 64, dtype=torch.float16, device=DEVICE)
    weight[:, :2] = 1  # 120000, past float16's end, until the residual is added
    residual = torch.tensor([[-60000.0, -65504, -59999]], dtype=torch.float16, device=DEVICE)
    want = (120000 + residual.double()).half()
    assert torch.equal(few_rows(x, weight, residual=residual), want)
    long = torch.nn.functional.pad(x, (0, 9000)), torch.nn.functional.pad(weight, (0, 9000))
    assert torch.equal(few_rows(*long, residual=residual), want)


def test_a_large_mean_and_large_values_lose_nothing():
    check(arrays(SINGLE, 3, 10, 96) | {"x": SINGLE.draw(3, 96) + 1000})
    check(arrays(HALF, 3, 10, 96) | {"x": 6e4 * HALF.draw(3, 96).sign()})


def test_arrays_of_other_dtypes():
    narrow, single = arrays(HALF, 3, 20, 40), arrays(SINGLE, 3, 20, 40)
    check(single | {name: narrow[name] for name in ("weight", "norm_weight", "bias")})
    # The product is of x's dtype: float16's copy of the weight, as `linear` has it.
    others = {name: single[name] for name in ("bias", "norm_weight", "norm_bias", "residual")}
    check(narrow | others)
    assert torch.equal(run(**narrow | {"weight": narrow["weight"].float()}), run(**narrow))


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_the_public_products_come_here_for_few_rows_without_a_gradient(rows, monkeypatch):
    called = []
    module = importlib.import_module("gpukernels.library.matmul")

    def counted(x, *args, **options):
        called.append(len(x))
        return few_rows(x, *args, **options)

    monkeypatch.setattr(module, "few_rows", counted)
    given = SINGLE.draws(x=(rows, 8), weight=(5, 8), bias=(5,), residual=(rows, 5))
    check_public("linear", given, activation="relu")
    norm = SINGLE.draws(x=(rows, 8), norm_weight=(8,), norm_bias=(8,), weight=(5, 8), bias=(5,))
    check_public("norm_linear", norm, activation="gelu")
    # LLaMA's, which have no biases.
    bare = {name: norm[name] for name in ("x", "norm_weight", "weight")}
    check_public("norm_linear", bare, norm="rms", norm_bias=None, eps=1e-6, with_x=True)
    check_public("linear", {name: given[name] for name in ("x", "weight", "residual")})
    assert called == ([rows] * 4 if rows <= 64 else [])
    called.clear()
    gpukernels.linear(given["x"].requires_grad_(), given["weight"])
    assert called == []
