"""Activations and their derivatives for kernels to fuse, on float32 values in registers.

    gelu       z Phi(z), Phi(z) = (1 + erf(z / sqrt(2))) / 2
    gelu_new   z sigmoid(v), v = 2 sqrt(2/pi) (z + 0.044715 z^3): equal to z/2 (1 + tanh(v/2)), without
               the cancellation of 1 + tanh where z is negative
    silu       z sigmoid(z)

A finite z gives a finite result, however large; minus infinity gives NaN, as torch's formulas do (0 times
infinity), and so do both infinities in the derivatives.

Hendrycks and Gimpel, arXiv 1606.08415.
"""

import math

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_ROOT_HALF_OVER_PI = tl.constexpr(math.sqrt(0.5 / math.pi))
_GELU_NEW_1 = tl.constexpr(2 * math.sqrt(2 / math.pi))  # v = _GELU_NEW_1 z + _GELU_NEW_3 z^3
_GELU_NEW_3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def _sigmoids(v):
    """sigmoid(v) and its derivative, sigmoid(v) sigmoid(-v): neither overflows nor cancels."""
    e = tl.exp(-tl.abs(v))
    total = 1 + e
    return tl.where(v < 0, e, 1.0) / total, e / (total * total)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation `NAME` of float32 z."""
    if NAME == "gelu":
        y = z * (0.5 + 0.5 * tl.erf(z * _ROOT_HALF))
    elif NAME == "gelu_new":
        y = z * _sigmoids(z * (_GELU_NEW_1 + _GELU_NEW_3 * (z * z)))[0]
    else:
        tl.static_assert(NAME == "silu")
        y = z * _sigmoids(z)[0]
    return y


@triton.jit
def activate_gradient(z, NAME: tl.constexpr):
    """The derivative of the activation `NAME` at float32 z."""
    if NAME == "gelu":
        dz = 0.5 + 0.5 * tl.erf(z * _ROOT_HALF) + z * (_ROOT_HALF_OVER_PI * tl.exp(-0.5 * z * z))
    elif NAME == "gelu_new":
        square = z * z
        gate, slope = _sigmoids(z * (_GELU_NEW_1 + _GELU_NEW_3 * square))
        # Where the slope is 0, the square may be infinite.
        dz = gate + z * tl.where(slope == 0, 0.0, slope * (_GELU_NEW_1 + 3 * _GELU_NEW_3 * square))
    else:
        tl.static_assert(NAME == "silu")
        gate, slope = _sigmoids(z)
        dz = gate + z * slope
    return dz
