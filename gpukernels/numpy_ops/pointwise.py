"""Ops on single elements and rows."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype, row_blocks


def embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    dtype = weight.dtype if dtype is None else np.dtype(dtype)
    _check_index("ids", ids, weight)
    if positions is None:
        return weight[ids].astype(dtype, copy=False)
    _check_index("positions", positions, position_weight)
    y = weight[ids].astype(dtype, copy=False)
    y += position_weight[positions]
    return y


def _check_index(name: str, index: np.ndarray, table: np.ndarray) -> None:
    # A negative index would quietly count from the end.
    if index.size and not 0 <= index.min() <= index.max() < len(table):
        raise IndexError(f"embedding: {name} must be 0 to {len(table) - 1}, got {index.min()} to {index.max()}")


def gelu(x, *, approximate="tanh"):
    return _activated(x, "gelu_new" if approximate == "tanh" else "gelu")


def swiglu(gate, up):
    return _activated(gate, "silu", up)


def _activated(x, activation, factor=None):
    """activation(x) * factor, rounded once; in blocks that stay in a core's cache."""
    compute = compute_dtype(x.dtype)
    y = np.empty(x.shape, x.dtype)
    width = x.shape[-1] if x.ndim else 1
    rows, out = x.reshape(-1, max(1, width)), y.reshape(-1, max(1, width))
    factors = None if factor is None else factor.reshape(rows.shape)
    for part in row_blocks(rows):
        block = rows[part].astype(compute)
        # minus infinity times 0 is NaN, as it is in torch
        ACTIVATIONS[activation](block)
        if factors is not None:
            block *= factors[part]
        out[part] = block
    return y


# Activations, in place. Overflow is meant to saturate: tanh(inf) is 1, x / inf is 0.


def _gelu_new(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, arXiv 1606.08415."""
    root = math.sqrt(2 / math.pi)
    inner = x * x
    inner *= 0.044715 * root
    inner += root
    inner *= x
    np.tanh(inner, out=inner)
    inner += 1
    inner *= 0.5
    x *= inner


def _gelu(x):
    half = erf(x * math.sqrt(0.5))
    half += 1
    half *= 0.5
    x *= half


def _relu(x):
    np.maximum(x, 0, out=x)


def _silu(x):
    denominator = np.exp(-x)
    denominator += 1
    x /= denominator


def _tanh(x):
    np.tanh(x, out=x)


ACTIVATIONS = {"gelu": _gelu, "gelu_new": _gelu_new, "relu": _relu, "silu": _silu, "tanh": _tanh}

# erf(x) = x P(x^2) / Q(x^2) for |x| up to the bound, where float32's erf has become 1: the rational
# approximation of XLA's ErfImpl32 (openxla/xla, math.cc). Highest power first.
_ERF_BOUND = 3.7439211627767994
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7,
    2.3547966471313185e-5,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)
_erf_exact = np.frompyfunc(math.erf, 1, 1)


def erf(x):
    """erf, as a new array: within 4e-7 of the true value in float32; float64 asks the C library."""
    if x.dtype == np.float64:
        return np.asarray(_erf_exact(x), np.float64)
    x = np.clip(x, -_ERF_BOUND, _ERF_BOUND)
    square = x * x
    x *= _horner(_ERF_P, square)
    x /= _horner(_ERF_Q, square)
    return x


def _horner(coefficients, x):
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += coefficient
    return y
