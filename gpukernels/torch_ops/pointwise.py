"""Ops on single elements and rows."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def gelu(x, *, approximate="tanh"):
    return F.gelu(x, approximate=approximate)


def swiglu(gate, up):
    compute = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(compute)) * up).to(gate.dtype)


def widen(dtype, *arrays):
    """The arrays in `dtype`: the widening of narrower storage, exact and without a copy if equal."""
    return [None if array is None else array.to(dtype) for array in arrays]


def embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    dtype = weight.dtype if dtype is None else dtype
    y = F.embedding(ids, weight).to(dtype)
    if positions is None:
        return y
    return y + F.embedding(positions, position_weight).to(dtype)
