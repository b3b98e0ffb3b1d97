"""What the ops should come to: a float64 truth written out in NumPy, and how far a result may be from it.

The truth gets the inputs' values as they were rounded to the tested dtype, widened. It also gives the
magnitude: what the result would come to if every term were counted with its absolute value. That and
the length of the sums are all that `bound` needs.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def bound(dtype: str, length: int, magnitude):
    """How far from the truth a result may be.

    With u the unit roundoff (half the distance from 1 to the next number), a value that is stored is off
    by u of itself. A sum of n products is off by n u of the sum of their absolute values (Higham, Accuracy
    and Stability, section 3.1), and by 7 sqrt(n) u except with a probability of 2 exp(-49 / 2), 5e-11
    (Higham and Mary, 2019), which is less from n = 49 on. Sums are made in float32 at least. An op stores
    at most four values in the dtype on the way to its result (the residual sum, the norm, the product,
    the activation) and passes each through at most 16 operations on single elements (a rational erf has
    14). float16's numbers below the normal ones are 2**-24 apart; those of float32 and bfloat16, from 2**-126 down,
    a GPU may take for 0. Twice all that in float64, where the truth errs as much.
    """
    store, add = UNIT[dtype], min(UNIT[dtype], UNIT["float32"])
    tiny = {"float16": 2.0**-24, "float64": 0.0}.get(dtype, 2.0**-126)
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


def true_norm_linear(
    x, norm_weight, norm_bias, weight, bias=None, *, norm="layer", eps=1e-5, activation=None, with_x=False
):  # fmt: skip
    h = normed(x, norm_weight, norm_bias, norm, eps)
    y = true_linear(h.value, weight, bias, activation=activation, x_magnitude=h.magnitude)
    return (y, Truth(x, 0 * x, 1)) if with_x else y


def normed(x, weight, bias, norm: str, eps: float) -> Truth:
    """What `norm_linear` multiplies: the norm of x; as large as it counts in a sum of products."""
    h = true_rms_norm(x, weight, eps=eps) if norm == "rms" else true_layer_norm(x, weight, bias, eps=eps)
    return h._replace(magnitude=h.magnitude + abs(h.value))


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


def true_packed_attention(qkv, **options):
    return true_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **options)


def true_decode_attention(q, k, v, lengths, *, window=None, scale=None):
    whole = true_attention(q[:, None], k, v, window=window, lengths=lengths, scale=scale)
    return Truth(whole.value[:, 0], whole.magnitude[:, 0], whole.length)


def true_gelu(x, *, approximate="tanh"):
    value = np.vectorize(ACTIVATIONS["gelu_new" if approximate == "tanh" else "gelu"], otypes=[float])(x)
    return Truth(value, abs(x), 1)  # 1 + tanh and 1 + erf are sums that may cancel


def true_swiglu(gate, up):
    return Truth(np.vectorize(ACTIVATIONS["silu"], otypes=[float])(gate) * up, abs(gate * up), 1)


def true_rope(x, positions, *, theta=10000.0, frequencies=None, interleaved=False):
    width = x.shape[-1]
    if frequencies is None:
        frequencies = (1.0 / theta ** (torch.arange(0, width, 2).float() / width)).numpy()
    # What an op may not be off by: the angle, which float32 rounds before anything is computed of it.
    angle = positions[..., None].astype(np.float32) * frequencies.astype(np.float32)
    value, magnitude = x.copy(), abs(x)
    for i in range(len(frequencies)):
        one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + len(frequencies))
        cos, sin = np.cos(angle[..., i : i + 1].astype(float)), np.sin(angle[..., i : i + 1].astype(float))
        a, b = x[..., one], x[..., other]
        value[..., one], value[..., other] = a * cos - b * sin, b * cos + a * sin
        magnitude[..., one], magnitude[..., other] = abs(a * cos) + abs(b * sin), abs(b * cos) + abs(a * sin)
    return Truth(value, magnitude, 1)


def true_embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    one, other = weight[ids], 0 if positions is None else position_weight[positions]
    return Truth(one + other, abs(one) + abs(other), 1)


TRUTHS = {name.removeprefix("true_"): f for name, f in list(globals().items()) if name.startswith("true_")}
