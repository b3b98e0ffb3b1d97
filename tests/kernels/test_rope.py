"""RoPE: both pairings, forward and back, against float64 of the same float32 angles."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, HALF, KINDS, SINGLE, but_for_rounding, check_gradients, ids
from truth import check

import gpukernels
from gpukernels import torch_ops
from gpukernels.kernels import rope as kernels
from gpukernels.kernels.tiles import RopeTile
from gpukernels.library.rope import _frequencies
from gpukernels.torch_ops.rope import default_frequencies
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS
from gpukernels.verify.truth import bound

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])

# B, T, H, D, and how many pairs rotate (0: all, at the default frequencies). A program takes up to 4096 / D heads.
SHAPES = [
    (1, 1, 1, 2, 0),
    (2, 3, 2, 10, 0),
    (1, 2, 3, 64, 0),
    (2, 1, 5, 128, 0),
    (1, 2, 33, 128, 0),
    (1, 1, 65, 80, 0),
    (2, 2, 3, 16, 1),
    (2, 2, 3, 20, 7),
    (1, 2, 3, 64, 8),
    (1, 2, 3, 14, 6),
    (0, 2, 2, 4, 0),
    (2, 0, 2, 4, 0),
    (2, 2, 0, 4, 0),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arrays(kind, shape, integer="int32", first=0):
    batch, new, heads, width, pairs = shape
    positions = first + np.random.default_rng(0).integers(0, 50, (batch, 1)) + np.arange(new)
    given = {"x": kind.draw(batch, new, heads, width), "positions": kind.ints(positions, integer)}
    if pairs:
        given["frequencies"] = SINGLE.array(10000.0 ** (-np.arange(pairs) / pairs))
    return given


def check_turned_back(given, *, layout="contiguous", **options):
    """The gradient of x. The frequencies are an option: they have no gradient, and stay float32 in the truth."""

    leaves = {"x": given["x"], "positions": given["positions"]}
    check_gradients("rope", leaves, layout=layout, **options, frequencies=given.get("frequencies"))


@both_pairings
@kinds
@shapes
def test_forward_and_backward(kind, shape, interleaved):
    for integer, first in (("int32", 0), ("int64", 1000)):
        given = arrays(kind, shape, integer, first)
        check("rope", given, interleaved=interleaved)
    check_turned_back(given, interleaved=interleaved)


@both_pairings
@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_far_positions_lose_nothing(integer, interleaved):
    """The angle is float32, as transformers has it; of that angle sine and cosine are right however large it is.

    With magnitudes |a cos| + |b sin|, `bound` gives both some 20 units u = 2**-24: each is right to 2 units
    in the last place (4 u), and there are three more roundings.
    """
    positions = [[131072, 131071, 105615, 105616, 99991], [-131072, 2**24 + 1, 2**31 - 1, -(2**31), 0]]
    given = {"x": SINGLE.draw(2, 5, 2, 128), "positions": SINGLE.ints(positions, integer)}
    given["frequencies"] = default_frequencies(500000.0, 128).to(DEVICE)
    check("rope", given, interleaved=interleaved)


def test_half_precision_turns_like_float32():
    """Only the store rounds: the angle of a half-precision x has all of float32's bits."""
    given = arrays(HALF, (1, 3, 2, 64, 0), "int64", 100000)
    wide = gpukernels.rope(given["x"].float(), given["positions"])
    assert torch.equal(gpukernels.rope(**given), wide.half())
    large = {"x": 6e4 * HALF.draw(1, 3, 2, 64).sign(), "positions": given["positions"]}
    wide = gpukernels.rope(large["x"].float(), large["positions"])
    assert torch.equal(gpukernels.rope(**large), wide.half())
    assert gpukernels.rope(**large).isinf().any()


@both_pairings
def test_every_block_of_heads(monkeypatch, interleaved):
    monkeypatch.setattr(kernels, "rope_tile", lambda heads, width: RopeTile(2, 1))
    for heads in (1, 2, 3, 5):
        given = arrays(HALF, (2, 2, heads, 12, 4))
        check("rope", given, interleaved=interleaved)
        check_turned_back(given, interleaved=interleaved)


@both_pairings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, interleaved):
    given = arrays(HALF, (2, 3, 4, 12, 4))
    laid_out = {name: LAYOUTS[layout](x) if x.is_floating_point() and x.ndim > 1 else x for name, x in given.items()}
    laid_out["positions"] = given["positions"].T.contiguous().T
    check("rope", laid_out, interleaved=interleaved)
    check_turned_back(laid_out, layout=layout, interleaved=interleaved)
    every_second = torch.stack((given["frequencies"], torch.full_like(given["frequencies"], torch.nan)), 1)[:, 0]
    check("rope", laid_out | {"frequencies": every_second}, interleaved=interleaved)


def test_queries_and_keys_of_a_packed_projection_are_not_copied(monkeypatch):
    qkv = HALF.draw(2, 5, 3, 4, 16)
    positions = SINGLE.ints([range(5)]).expand(2, 5)
    want = [gpukernels.rope(qkv[:, :, i].contiguous(), positions) for i in range(2)]
    gpukernels.rope(qkv[:, :, 0], positions)  # makes the frequencies

    def copied(x, *_):
        assert x.ndim == 1, "this was copied"
        return x

    monkeypatch.setattr(torch.Tensor, "contiguous", copied)
    for i in range(2):
        assert torch.equal(gpukernels.rope(qkv[:, :, i], positions), want[i])
    both = gpukernels.rope(qkv[:, :, :2].flatten(2, 3), positions)
    assert torch.equal(both, torch.cat(want, 2))
    # Fewer heads of keys: 8 of queries, 2 of keys, 2 of values.
    grouped = qkv.flatten(2, 3)
    assert torch.equal(gpukernels.rope(grouped[:, :, :8], positions), both)
    assert torch.equal(gpukernels.rope(grouped[:, :, 4:8], positions), want[1])


def test_one_table_for_each_theta_and_width_the_same_as_transformers():
    x, positions = SINGLE.draw(1, 7, 2, 64), SINGLE.ints([range(1000, 1007)])
    for theta in (10000.0, 500000.0):
        for width in (64, 32):
            part = x[..., :width]
            table = default_frequencies(theta, width).to(DEVICE)
            for _ in range(2):
                got = gpukernels.rope(part, positions, theta=theta)
                assert torch.equal(got, gpukernels.rope(part, positions, frequencies=table))


def test_a_gradient_is_the_turn_back_and_has_gradients_itself():
    given = arrays(SINGLE, (2, 3, 2, 12, 4))
    x = given.pop("x").requires_grad_()
    dy = SINGLE.draw(*x.shape, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(gpukernels.rope(x, **given), x, dy, create_graph=True)
    back = gpukernels.rope(dy, given["positions"], frequencies=-given["frequencies"])
    assert but_for_rounding(dx, back)
    (ddy,) = torch.autograd.grad(dx, dy, x.detach())
    assert torch.equal(ddy, gpukernels.rope(x, **given))
    there_and_back = gpukernels.rope(gpukernels.rope(x, **given), given["positions"], frequencies=-given["frequencies"])
    assert (abs(host(there_and_back) - host(x)) <= 4 * bound("float32", 1, abs(host(x)).max())).all()


def test_the_same_bits_every_time_and_whatever_the_neighbours():
    given = arrays(HALF, (3, 4, 5, 64, 24))
    first, second = (gpukernels.rope(**given) for _ in range(2))
    assert torch.equal(first, second)
    part = given | {"x": given["x"][1:2, 2:3, 3:4], "positions": given["positions"][1:2, 2:3]}
    assert torch.equal(gpukernels.rope(**part)[0, 0, 0], first[1, 2, 3])
    rest = given["x"][..., 48:]
    assert torch.equal(first[..., 48:], rest)


def test_the_plain_form_and_the_kernel_agree():
    given = arrays(SINGLE, (2, 3, 2, 64, 0))
    limit = 2 * bound("float32", 1, abs(host(given["x"])).max() * 2)
    assert (abs(host(gpukernels.rope(**given)) - host(torch_ops.rope(**given))) <= limit).all()


def test_default_frequencies_stay_where_a_captured_graph_reads_them():
    first = _frequencies(10000.0, 8, torch.device("cpu"))
    for theta in range(2, 100):
        _frequencies(float(theta), 8, torch.device("cpu"))
    assert _frequencies(10000.0, 8, torch.device("cpu")) is first
