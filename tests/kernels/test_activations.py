"""The activations and their derivatives, as kernels use them, over the whole range of float32."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE

from gpukernels.kernels.activations import activate, activation_slope
from gpukernels.torch_ops.pointwise import ACTIVATIONS as PLAIN
from gpukernels.verify.truth import ACTIVATIONS, UNIT

names = pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name is not None])


@triton.jit
def _both_kernel(x_ptr, y_ptr, slope_ptr, N, BLOCK: tl.constexpr, NAME: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < N, other=0.0)
    tl.store(y_ptr + i, activate(x, NAME), i < N)
    tl.store(slope_ptr + i, activation_slope(x, NAME), i < N)


def both(name, x):
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _both_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, slope, x.numel(), BLOCK=1024, NAME=name)
    return y, slope


@names
def test_values_and_slopes(name):
    """tanh, silu and gelu_new are right to a few units in their last place, and as many more as the rounding of an
    exponent comes to. gelu takes 1 + erf, and near -1 erf's rounding is what is left."""
    sizes = np.logspace(-30, 4, 1500)
    points = np.concatenate((-sizes, [0.0], sizes, np.linspace(-9, 9, 2001))).astype(np.float32)
    x = torch.tensor(points, device=DEVICE)
    y, slope = both(name, x)
    wide = x.double().requires_grad_()
    truth = PLAIN[name](wide)
    (true_slope,) = torch.autograd.grad(truth.sum(), wide)
    size = x.double().abs()
    exponent = {"silu": size, "tanh": 2 * size, "gelu_new": 1.6 * (size + 0.045 * size**3), "gelu": size**2 / 2}
    times = 16 + 2 * exponent.get(name, size * 0).clamp(max=200)
    limit, slope_limit = (times * UNIT["float32"] * each.detach().abs() for each in (truth, true_slope))
    if name == "gelu":
        limit, slope_limit = limit + 4 * UNIT["float32"] * size, slope_limit + 4 * UNIT["float32"]
    if name in ("gelu_new", "silu"):  # the slope is a sum of two terms, one of which may be negative
        slope_limit = slope_limit + times * UNIT["float32"] * 2 * truth.detach().abs() / size.clamp(min=1e-30)
        slope_limit = slope_limit + times * UNIT["float32"] * exponent[name] * torch.exp(-exponent[name])
    tiny = 2.0**-126 + 16 * UNIT["float64"] * (1 + size)  # below, float32 loses places; torch's 1 + tanh does before
    for found, true, most in ((y, truth, limit), (slope, true_slope, slope_limit)):
        error = (found.double() - true.detach()).abs()
        assert (error <= most + tiny).all(), f"{name}: {(error / (most + tiny)).max()} at {x[error > most + tiny][:5]}"


@names
def test_the_ends(name):
    x = torch.tensor([math.nan, math.inf, 3e38, -3e38, 0.0, -0.0], device=DEVICE)
    y, slope = (each.tolist() for each in both(name, x))
    assert math.isnan(y[0])
    assert math.isnan(slope[0])
    top = 1.0 if name == "tanh" else math.inf
    assert y[1] == top
    assert y[2] == (1.0 if name == "tanh" else pytest.approx(3e38))
    assert y[3] == (-1.0 if name == "tanh" else 0.0)
    assert y[4:] == [0.0, 0.0]
    assert slope[4] == {"relu": 0.0, "tanh": 1.0}.get(name, 0.5)
    if name != "gelu_new":  # whose slope has x squared in it
        assert slope[2:4] == ([0.0, 0.0] if name == "tanh" else [1.0, 0.0])


def test_no_activation():
    x = torch.randn(5, device=DEVICE)
    y, slope = both(None, x)
    assert torch.equal(y, x)
    assert torch.equal(slope, torch.ones_like(x))
