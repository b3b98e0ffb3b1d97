"""GELU and SwiGLU: every dtype, around every block, against float64; and values of any size."""

import math

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF, KINDS, SINGLE, but_for_rounding, check_gradients, ids
from truth import Kind, check

import gpukernels
from gpukernels.kernels.tiles import pointwise_tile
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)
approximations = pytest.mark.parametrize("approximate", ["tanh", "none"])

# A program has 2048 elements: 128 rows of up to 16 columns, or a part of one row.
SHAPES = [(), (1,), (7,), (2047,), (2048,), (2049,), (2, 3, 5), (5, 1000), (0, 5), (2, 0, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Rows that do not lie one behind the other: rows and columns of a program, and one more or less of each.
ROWS = [(127, 15), (128, 16), (129, 17), (31, 64), (2, 1025), (3, 2047), (2, 2049)]


def packed(kind, *shape):
    """gate and up as the halves of one product."""
    both = kind.draw(*shape[:-1], 2 * shape[-1])
    gate, up = both.chunk(2, -1)
    return {"gate": gate, "up": up}


@approximations
@kinds
@shapes
def test_gelu(kind, shape, approximate):
    for spread in (1, 10):
        given = {"x": kind.draw(*shape, spread=spread)}
        check("gelu", given, approximate=approximate)
        check_gradients("gelu", given, approximate=approximate)


@kinds
@shapes
def test_swiglu(kind, shape):
    for spread in (1, 10):
        given = {"gate": kind.draw(*shape, spread=spread), "up": kind.draw(*shape, seed=1)}
        check("swiglu", given)
        check_gradients("swiglu", given)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_with_something_between_them(shape):
    check("swiglu", packed(HALF, *shape))
    check_gradients("swiglu", packed(HALF, *shape), layout="sliced")
    given = {"x": LAYOUTS["sliced"](HALF.draw(*shape))}
    check("gelu", given)
    check_gradients("gelu", given)
    check_gradients("gelu", {"x": HALF.draw(*shape)}, layout="sliced")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    for upstream in ("contiguous", layout):
        given = {"x": LAYOUTS[layout](HALF.draw(6, 5, 40))}
        check("gelu", given)
        check_gradients("gelu", given, layout=upstream)
        given = {name: LAYOUTS[layout](x) for name, x in HALF.draws(gate=(6, 5, 40), up=(6, 5, 40)).items()}
        check("swiglu", given)
        check_gradients("swiglu", given, layout=upstream)
        check("swiglu", given | {"up": given["up"].contiguous()})


def test_the_halves_of_a_product_are_not_copied(monkeypatch):
    def copied(x, *_):
        raise AssertionError("this was copied")

    given = packed(HALF, 3, 5, 40)
    monkeypatch.setattr(torch.Tensor, "contiguous", copied)
    gpukernels.swiglu(**given)


def test_the_gradient_of_a_sum():
    """An upstream gradient that is one number, seen from everywhere."""
    x = SINGLE.draw(5, 40).requires_grad_()
    (once,) = torch.autograd.grad(gpukernels.gelu(x).sum(), x)
    (other,) = torch.autograd.grad(gpukernels.gelu(x), x, torch.ones(5, 40, device=DEVICE))
    assert torch.equal(once, other)


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_only_the_gradients_that_are_asked_for(frozen):
    given = SINGLE.draws(gate=(5, 40), up=(5, 40))
    leaves = {key: x.clone().requires_grad_(key != frozen) for key, x in given.items()}
    gpukernels.swiglu(**leaves).sum().backward()
    all_leaves = {key: x.clone().requires_grad_() for key, x in given.items()}
    gpukernels.swiglu(**all_leaves).sum().backward()
    for key, x in leaves.items():
        assert x.grad is None if key == frozen else but_for_rounding(x.grad, all_leaves[key].grad)


def gradient(op, x, *others, **options):
    x = x.clone().requires_grad_()
    y = op(x, *others, **options)
    return host(torch.autograd.grad(y, x, torch.ones_like(y))[0])


@kinds
@approximations
def test_large_values_saturate(kind, approximate):
    """Finite numbers give finite ones, with a slope of 1 or 0; infinities give what torch's formulas do."""
    largest = torch.finfo(getattr(torch, kind.dtype)).max
    large = kind.array([100.0, 1e4, 6e4, largest])
    one = kind.array(np.ones(4))
    for x in (large, -large):
        want, slope = host(x) * (host(x) > 0), 1.0 * (host(x) > 0)
        for result, dx in (
            (gpukernels.gelu(x, approximate=approximate), gradient(gpukernels.gelu, x, approximate=approximate)),
            (gpukernels.swiglu(x, one), gradient(gpukernels.swiglu, x, one)),
        ):
            np.testing.assert_allclose(host(result), want, rtol=0, atol=1e-30)
            np.testing.assert_allclose(dx, slope, rtol=0, atol=1e-30)
    odd = kind.array([math.inf, -math.inf, math.nan, 0.0])
    wide = Kind("torch", "float64").array(host(odd))
    for op, others, options in (
        (gpukernels.gelu, [], {"approximate": approximate}),
        (gpukernels.swiglu, [one], {}),
    ):
        torchs = [other.cpu().double() for other in others]
        np.testing.assert_array_equal(host(op(odd, *others, **options)), host(op(wide, *torchs, **options)))
        np.testing.assert_array_equal(gradient(op, odd, *others, **options), gradient(op, wide, *torchs, **options))


def test_the_tanh_form_loses_nothing_where_x_is_negative():
    """x sigmoid(v) instead of x/2 (1 + tanh): right to a few units in the last place, not only next to |x|.

    exp(v) errs by |v| u of itself, v by 4 u, and there are at most 8 more operations, with u = 2**-24.
    """
    x = torch.linspace(-5, 0, 301, device=DEVICE)
    wide = host(x)
    v = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    truth = wide / (1 + np.exp(-v))
    error = abs(host(gpukernels.gelu(x)) - truth)
    assert (error <= (5 * abs(v) + 8) * 2.0**-24 * abs(truth)).all()


def test_the_same_bits_every_time_and_whatever_the_neighbours():
    given = {key: x.requires_grad_() for key, x in HALF.draws(gate=(37, 100), up=(37, 100)).items()}
    runs = []
    for _ in range(2):
        y, z = gpukernels.swiglu(**given), gpukernels.gelu(given["gate"])
        runs.append([y, z, *torch.autograd.grad((y, z), list(given.values()), (torch.ones_like(y), y.detach()))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert torch.equal(gpukernels.swiglu(given["gate"][5:6], given["up"][5:6])[0], runs[0][0][5])
    assert torch.equal(gpukernels.gelu(given["gate"][5:6])[0], runs[0][1][5])


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1024, 1025, 2048, 2049, 10**6])
def test_a_tile_has_2048_elements_and_no_more_columns_than_it_needs(columns):
    tile = pointwise_tile(columns)
    assert tile.BLOCK_M * tile.BLOCK_N == 2048
    assert 2 * max(columns, 16) > tile.BLOCK_N
