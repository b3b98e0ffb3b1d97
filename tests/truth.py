"""Arrays of every kind, drawn in the tested dtype, and ops compared with `gpukernels.verify.truth`."""

from typing import NamedTuple

import numpy as np
import torch

import gpukernels
from gpukernels.verify.compare import forward, host
from gpukernels.verify.truth import TRUTHS, UNIT, bound


class Kind(NamedTuple):
    """A library and a dtype: how arrays of it are made."""

    arrays: str  # "numpy" or "torch"
    dtype: str
    device: str = "cpu"

    def array(self, values):
        if self.arrays == "numpy":
            return np.asarray(values).astype(self.dtype)
        return torch.tensor(np.asarray(values)).to(self.device, getattr(torch, self.dtype))

    def ints(self, values, dtype="int32"):
        return self._replace(dtype=dtype).array(values)

    def draw(self, *shape, seed=0, spread=1.0):
        return self.array(spread * np.random.default_rng([seed, *shape]).standard_normal(shape))

    def draws(self, **shapes):
        return {name: self.draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def rounded_once(norm, kind, shape, *, product):
    """A 16-bit norm is off by one rounding and float32's errors: the product with the weight comes before it.

    norm: "layer" or "rms". product: of `norm_linear`, whose weight is rows of the identity: nothing else is rounded
    then, and they are few enough for the norm to be in the product's prologue.
    """
    name, width = f"{norm}_norm", shape[-1]
    x, weight = kind.draw(*shape, spread=30), kind.draw(width, seed=1)
    if product:
        y = gpukernels.norm_linear(x, weight, None, kind.array(np.eye(20, width)), norm=norm, eps=1e-5)
    else:
        y = getattr(gpukernels, name)(x, weight, eps=1e-5)[..., :20]
    truth = TRUTHS[name](host(x), host(weight), eps=1e-5)
    value, single = (each[..., :20] for each in (truth.value, bound("float32", truth.length, truth.magnitude)))
    tiny = 2.0**-25 if kind.dtype == "float16" else 0.0  # half of what is between its smallest numbers
    assert (abs(host(y) - value) <= UNIT[kind.dtype] * (abs(value) + single) + single + tiny).all()


def check(op, arrays, *, result_dtype=None, **options):
    """The op's result is the truth within the bound, of the right shape and dtype; inputs stay as they were."""
    for each in forward(op, arrays, result=result_dtype, **options):
        worst = each.errors().max(initial=0)
        assert worst <= 1, f"{op}: {each.what} is off by {worst} times the bound"
