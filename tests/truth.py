"""What the ops should come to: a float64 truth written out in NumPy, and how far a result may be from it.

Inputs are drawn in the tested dtype; the truth gets those rounded values, widened. It also gives the
magnitude: what the result would come to if every term were counted with its absolute value. That and
the length of the sums are all that `bound` needs.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

import gpukernels

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def bound(dtype: str, length: int, magnitude):
    """How far from the truth a result may be.

    With u the unit roundoff (half the distance from 1 to the next number), a value that is stored is off
    by u of itself. A sum of n products is off by n u of the sum of their absolute values (Higham, Accuracy
    and Stability, section 3.1), and by 7 sqrt(n) u except with a probability of 2 exp(-49 / 2), 5e-11
    (Higham and Mary, 2019), which is less from n = 49 on. Sums are made in float32 at least. An op stores
    at most four values in the dtype on the way to its result (the residual sum, the norm, the product,
    the activation) and passes each through at most 16 operations on single elements (a rational erf has
    14). float16's numbers below the normal ones are 2**-24 apart. Twice all that in float64, where the
    truth errs as much.
    """
    store, add = UNIT[dtype], min(UNIT[dtype], UNIT["float32"])
    tiny = 2.0**-24 if dtype == "float16" else 0.0
    once = (4 * store + (min(length, 7 * math.sqrt(length)) + 16) * add) * magnitude + tiny
    return 2 * once if dtype == "float64" else once


class Truth(NamedTuple):
    value: np.ndarray
    magnitude: np.ndarray
    length: int  # of the longest sum
    wide: bool = False  # the result is float32 at least, whatever the first array is


ACTIVATIONS = {
    None: lambda z: z,
    "gelu": lambda z: z / 2 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_new": lambda z: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: max(z, 0.0),
    "silu": lambda z: z / (1 + math.exp(-z)) if z > -700 else 0.0,
    "tanh": math.tanh,
}
STEEPEST = 1.13  # no activation has a larger slope: gelu's is 1.129


def true_layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    total = x if residual is None else x + residual
    size = abs(total) if residual is None else abs(x) + abs(residual)
    deviation = total - total.sum(-1, keepdims=True) / x.shape[-1]
    spread = np.sqrt((deviation**2).sum(-1, keepdims=True) / x.shape[-1] + eps)
    value, shift = deviation / spread * weight, 0 if bias is None else bias
    # An error of one element moves the numerator by itself and the spread by as much at most.
    largest = np.max(size, -1, keepdims=True, initial=0)
    magnitude = abs(weight) * largest / spread * (1 + abs(deviation) / spread) + abs(shift)
    norm = Truth(value + shift, magnitude, x.shape[-1])
    return norm if residual is None else (norm, Truth(total, size, 1))


def true_rms_norm(x, weight, *, eps=1e-6, residual=None):
    total = x if residual is None else x + residual
    size = abs(total) if residual is None else abs(x) + abs(residual)
    spread = np.sqrt((total**2).sum(-1, keepdims=True) / x.shape[-1] + eps)
    largest = np.max(size, -1, keepdims=True, initial=0)
    norm = Truth(total / spread * weight, abs(weight) * (size + abs(total) * largest / spread) / spread, x.shape[-1])
    return norm if residual is None else (norm, Truth(total, size, 1))


def true_linear(x, weight, bias=None, *, activation=None, residual=None, x_magnitude=None):
    z = np.einsum("...k,nk->...n", x, weight)  # a loop in C, not the BLAS that NumPy's product calls
    size = np.einsum("...k,nk->...n", abs(x) if x_magnitude is None else x_magnitude, abs(weight))
    if bias is not None:
        z, size = z + bias, size + abs(bias)
    value = np.vectorize(ACTIVATIONS[activation], otypes=[float])(z)
    if residual is not None:
        value, size = value + residual, size + abs(residual)
    return Truth(value, STEEPEST * size, x.shape[-1])


def true_norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    norm = true_layer_norm(x, norm_weight, norm_bias, eps=eps)
    size = norm.magnitude + abs(norm.value)
    return true_linear(norm.value, weight, bias, activation=activation, x_magnitude=size)


def true_matmul(a, b):
    spec = "...mk,kn->...mn" if b.ndim == 2 else "...mk,...kn->...mn"
    return Truth(np.einsum(spec, a, b), np.einsum(spec, abs(a), abs(b)), a.shape[-1])


def true_attention(
    q, k, v, *, causal=True, window=None, lengths=None, documents=None, scale=None, return_lse=False
):  # fmt: skip
    (batch, new, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    value, magnitude = np.zeros(q.shape), np.zeros(q.shape)
    lse, lse_magnitude = np.full((batch, heads, new), -np.inf), np.zeros((batch, heads, new))

    def same_document(row, i, j):
        return documents is None or len(set(documents[row, min(i, j) : max(i, j) + 1])) == 1

    for row in range(batch):
        length = keys if lengths is None else lengths[row]
        for i in range(new):
            p = length - new + i
            seen = [j for j in range(length) if (not causal or j <= p) and (window is None or j > p - window)]
            seen = [j for j in seen if p >= 0 and same_document(row, p, j)]
            for head in range(heads if p >= 0 else 0):
                values = v[row, seen, head // (heads // kv_heads)]
                terms = scale * q[row, i, head] * k[row, seen, head // (heads // kv_heads)]
                largest = terms.sum(-1).max()
                weights = np.exp(terms.sum(-1) - largest)
                lse[row, head, i] = largest + np.log(weights.sum())
                weights /= weights.sum()
                value[row, i, head] = weights @ values
                # A score that is off by d changes its weight by a factor of exp(d), and the sum too.
                size = abs(terms).sum(-1).max()
                magnitude[row, i, head] = weights @ abs(values) * (1 + 2 * size)
                lse_magnitude[row, head, i] = 1 + size + abs(lse[row, head, i])
    out = Truth(value, magnitude, max(width, keys))
    if not return_lse:
        return out
    return out, Truth(lse, lse_magnitude, max(width, keys), wide=True)


def true_embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    one, other = weight[ids], 0 if positions is None else position_weight[positions]
    return Truth(one + other, abs(one) + abs(other), 1)


TRUTHS = {name.removeprefix("true_"): f for name, f in list(globals().items()) if name.startswith("true_")}


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


def host(array):
    """The values as NumPy has them, floats as float64, in memory of their own."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.double().numpy() if array.is_floating_point() else array.numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array.copy()


def check(op, arrays, *, result_dtype=None, **options):
    """The op's result is the truth within the bound, of the right shape and dtype; inputs stay as they were."""
    before = {name: host(array) for name, array in arrays.items()}
    results = getattr(gpukernels, op)(**arrays, **options)
    for name, array in arrays.items():
        np.testing.assert_array_equal(host(array), before[name], err_msg=f"{op} changed {name}")
    named = [str(array.dtype).removeprefix("torch.") for array in arrays.values()]
    dtype = result_dtype or next(name for name in named if "float" in name)
    truths = TRUTHS[op](**before, **options)
    pairs = [(results, truths)] if isinstance(truths, Truth) else zip(results, truths, strict=True)
    for result, truth in pairs:
        own = min(dtype, "float32", key=UNIT.__getitem__) if truth.wide else dtype
        assert str(result.dtype).removeprefix("torch.") == own
        assert tuple(result.shape) == truth.value.shape
        found, limit = host(result), bound(own, truth.length, truth.magnitude)
        with np.errstate(invalid="ignore"):
            error = np.where(found == truth.value, 0, abs(found - truth.value))  # -inf - -inf is no number
        assert (error <= limit).all(), f"off by {np.nanmax(error / limit)} times the bound"
