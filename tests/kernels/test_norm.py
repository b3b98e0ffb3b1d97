"""Layer norm and RMS norm: every path by width, every dtype, against float64."""

import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, HALF, KINDS, SINGLE, but_for_rounding, check_gradients, ids
from truth import check, rounded_once

import gpukernels
from gpukernels.kernels import tiles
from gpukernels.library import norm as norm_library
from gpukernels.verify.layouts import LAYOUTS

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)
names = pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])

# Rows of a program: 16 up to 128 columns, then 4 in pieces of 512 bytes, to 2048 columns forward and 768 back, where 2
# follow and from 1025 on 1; wider than registers: 16384 forward, 8192 back.
SHAPES = [
    (1, 1), (7,), (15, 3), (16, 16), (17, 33), (2, 3, 128), (5, 129), (9, 600), (3, 768), (5, 769), (2, 1025), (0, 5),
    (2, 0, 5),
]  # fmt: skip
WIDE = [(2, 8192), (3, 8193), (2, 16385)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arrays(name, kind, shape, *, residual=True, bias=True):
    given = kind.draws(x=shape, weight=shape[-1:], bias=shape[-1:], residual=shape)
    left_out = {*(() if residual else ("residual",)), *(() if bias and name == "layer_norm" else ("bias",))}
    return {key: value for key, value in given.items() if key not in left_out}


@names
@kinds
@shapes
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_forward(name, kind, shape, residual):
    for eps in (1e-5, 0.3):
        check(name, arrays(name, kind, shape, residual=residual), eps=eps)
    check(name, arrays(name, kind, shape, residual=residual, bias=False))


@names
@kinds
@shapes
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_backward(name, kind, shape, residual):
    given = arrays(name, kind, shape, residual=residual)
    for eps in (1e-5, 0.3):
        check_gradients(name, given, eps=eps)


@names
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_rows_wider_than_registers(name, shape):
    for given in (arrays(name, HALF, shape), arrays(name, SINGLE, shape, residual=False)):
        check(name, given, eps=1e-5)
        check_gradients(name, given, eps=1e-5)


@names
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(name, layout):
    given = arrays(name, HALF, (6, 5, 40))
    laid_out = {key: LAYOUTS[layout](x) if x.ndim > 1 else x for key, x in given.items()}
    check(name, laid_out)
    check_gradients(name, laid_out, layout=layout, eps=1e-5)


@names
@pytest.mark.parametrize(("rows", "width"), [(16 * 3 * 3 * 2 + 5, 5), (4 * 2 * 3 * 2 + 5, 600), (1 * 3 * 8 + 1, 4096)])
def test_more_rows_than_programs_of_the_backward_pass(name, rows, width):
    # Three multiprocessors under the interpreter, with 3 programs of 16 rows each, or 2 of 4, or 1 of 1.
    check_gradients(name, arrays(name, SINGLE, (rows, width)), eps=1e-5)


@names
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_asked_for(name, frozen):
    given = arrays(name, SINGLE, (5, 40), residual=False)
    leaves = {key: x.clone().requires_grad_(key != frozen) for key, x in given.items()}
    y = getattr(gpukernels, name)(**leaves)
    y.backward(torch.ones_like(y))
    all_leaves = {key: x.clone().requires_grad_() for key, x in given.items()}
    every = getattr(gpukernels, name)(**all_leaves)
    every.backward(torch.ones_like(every))
    for key, x in leaves.items():
        assert x.grad is None if key == frozen else but_for_rounding(x.grad, all_leaves[key].grad)


def test_a_result_nobody_used_has_no_gradient():
    for used in (0, 1):
        given = {key: x.requires_grad_() for key, x in arrays("layer_norm", SINGLE, (5, 40)).items()}
        result = gpukernels.layer_norm(**given)[used]
        gradients = torch.autograd.grad(result.sum(), [given["x"], given["residual"]])
        assert torch.equal(*gradients)
        if used:
            assert torch.equal(gradients[0], torch.ones_like(gradients[0]))


def before_a_product(name, kind, x, outputs, *, bias=True):
    """Arrays of `norm_linear` with this norm in it, and its options."""
    width = x[-1]
    given = kind.draws(x=x, norm_weight=(width,), norm_bias=(width,), weight=(outputs, width), bias=(outputs,))
    left_out = {*(() if name == "layer_norm" else ("norm_bias",)), *(() if bias else ("norm_bias", "bias"))}
    given = {key: array for key, array in given.items() if key not in left_out}
    options = {"norm": name.removesuffix("_norm"), "eps": 1e-5}
    return given, options | ({} if "norm_bias" in given else {"norm_bias": None})


# Few rows, and more than few; rows that are wider than the few-row kernel, and the norm's, has room for.
@names
@pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
@pytest.mark.parametrize("shape", [(1, 20, 40), (2, 3, 20, 40), (70, 24, 33), (3, 5, 8200)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no bias"])
def test_before_a_product(name, kind, shape, bias):
    *x, outputs, width = shape
    given, options = before_a_product(name, kind, (*x, width), outputs, bias=bias)
    check("norm_linear", given, **options, activation="silu")
    for with_x in (False, True):
        check_gradients("norm_linear", given, **options, with_x=with_x)


@names
@pytest.mark.parametrize("kind", [HALF, SINGLE], ids=ids)
def test_the_gradient_along_x_is_added_in_the_backward_kernel(name, kind):
    """Of `norm_linear(..., with_x=True)`, as along the sum of x and a residual of zeros."""
    given, options = before_a_product(name, kind, (5, 14, 40), 24, bias=name == "layer_norm")
    leaves = {key: array.requires_grad_() for key, array in given.items() if key != "bias"}
    y, x = gpukernels.norm_linear(**leaves, **options, with_x=True)
    norm = {key.removeprefix("norm_"): leaves[key] for key in ("norm_weight", "norm_bias") if key in leaves}
    h, total = getattr(gpukernels, name)(leaves["x"], **norm, eps=1e-5, residual=torch.zeros_like(x))
    wanted = gpukernels.linear(h, leaves["weight"])
    assert but_for_rounding(y, wanted)
    assert torch.equal(x, leaves["x"])
    upstream = kind.draw(*y.shape), kind.draw(*x.shape, seed=1)
    gradients = [
        torch.autograd.grad(results, list(leaves.values()), upstream, retain_graph=True)
        for results in ((y, x), (wanted, total))
    ]
    assert all(but_for_rounding(*pair) for pair in zip(*gradients, strict=True))
    # Of one alone, the other's is nothing.
    (along_x,) = torch.autograd.grad(x, leaves["x"], upstream[1], retain_graph=True)
    assert torch.equal(along_x, upstream[1])
    (along_y,) = torch.autograd.grad(y, leaves["x"], upstream[0], retain_graph=True)
    assert torch.equal(along_y, torch.autograd.grad(wanted, leaves["x"], upstream[0])[0])


@names
def test_the_same_bits_every_time_and_whatever_the_neighbours(name):
    given = {key: x.requires_grad_() for key, x in arrays(name, HALF, (37, 768)).items()}
    runs = []
    for _ in range(2):
        y, s = getattr(gpukernels, name)(**given)
        runs.append([y, s, *torch.autograd.grad((y, s), list(given.values()), (torch.ones_like(y), y.detach()))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    alone, _ = getattr(gpukernels, name)(**given | {"x": given["x"][5:6], "residual": given["residual"][5:6]})
    assert torch.equal(alone[0], runs[0][0][5])


@names
@pytest.mark.parametrize("rows", [50, 70])
@pytest.mark.parametrize("product", [False, True], ids=["alone", "before a product"])
def test_a_norm_is_rounded_once(name, rows, product):
    rounded_once(name.removesuffix("_norm"), HALF, (rows, 300), product=product)


@names
def test_the_gradient_along_x_takes_no_launch_more(name, monkeypatch):
    given, options = before_a_product(name, HALF, (70, 40), 24)
    leaves = {key: array.requires_grad_() for key, array in given.items()}
    added = []
    backward = norm_library.norm_backward

    def seen(dy, dtotal, *arguments, **needs):
        added.append(dtotal)
        return backward(dy, dtotal, *arguments, **needs)

    monkeypatch.setattr(norm_library, "norm_backward", seen)
    y, x = gpukernels.norm_linear(**leaves, **options, with_x=True)
    along_x = torch.ones_like(x)
    torch.autograd.grad((y, x), list(leaves.values()), (torch.ones_like(y), along_x))
    assert len(added) == 1
    assert torch.equal(added[0], along_x)


def test_a_large_mean_and_large_values_lose_nothing():
    x = SINGLE.draw(4, 96) + 1000
    check("layer_norm", {"x": x, "weight": SINGLE.draw(96)})
    check("layer_norm", {"x": 6e4 * HALF.draw(4, 96).sign(), "weight": HALF.draw(96), "bias": HALF.draw(96)})
    wide = torch.full((1, 16400), 1000.0, device=DEVICE) + SINGLE.draw(1, 16400)
    check("layer_norm", {"x": wide, "weight": SINGLE.draw(16400)})


def test_a_weight_of_another_dtype_is_widened():
    for x, weight in ((SINGLE, HALF), (HALF, SINGLE)):
        given = x.draws(x=(3, 40), residual=(3, 40)) | weight.draws(weight=(40,), bias=(40,))
        check("layer_norm", given, result_dtype=x.dtype)
        check_gradients("layer_norm", given, eps=1e-5)


TABLES = {tiles.norm_forward_tile: tiles._NORM_FORWARD, tiles.norm_backward_tile: tiles._NORM_BACKWARD}


@pytest.mark.parametrize(("tile", "width"), [(tile, width) for tile, table in TABLES.items() for width in table])
def test_at_each_step_of_the_tile_tables(tile, width):
    table = TABLES[tile]
    for itemsize in (2, 4):
        assert tile(width, itemsize) != tile(width + 1, itemsize)
        assert tile(width + 1, itemsize).whole == any(width < each for each in table)
    for columns in (width - 1, width):
        given = arrays("layer_norm", SINGLE, (2, columns))
        check("layer_norm", given)
        check_gradients("layer_norm", given, eps=1e-5)
