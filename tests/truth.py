"""Arrays of every kind, drawn in the tested dtype, and ops compared with `gpukernels.verify.truth`."""

from typing import NamedTuple

import numpy as np
import torch

from gpukernels.verify.compare import forward


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


def check(op, arrays, *, result_dtype=None, **options):
    """The op's result is the truth within the bound, of the right shape and dtype; inputs stay as they were."""
    for each in forward(op, arrays, result=result_dtype, **options):
        worst = each.errors().max(initial=0)
        assert worst <= 1, f"{op}: {each.what} is off by {worst} times the bound"
