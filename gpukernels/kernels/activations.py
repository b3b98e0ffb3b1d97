"""The activations of `gpukernels.ops.ACTIVATIONS` and their derivatives, on float32 values inside kernels.

    gelu      x / 2 * (1 + erf(x / sqrt(2)))          Hendrycks and Gimpel, arXiv 1606.08415
    gelu_new  x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)          its tanh form
    relu      max(x, 0)
    silu      x * sigmoid(x)
    tanh      tanh(x)

x * sigmoid(z) is x / (1 + 2^(-z log2 e)): a power that overflows is infinite, and the quotient the 0 that it should be.
Elsewhere exponents are never positive, and no small difference of large numbers is taken. A NaN stays one. Powers are
of 2, one instruction; the factor log2 e is in a constant. In the epilogue of a product an instruction an element is a
percent of its time. Written with what Triton itself has (its interpreter has no CUDA library).
"""

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(math.log2(math.e))
# 2 u = x (a + b x^2), and in units of log 2
_A, _B = tl.constexpr(math.sqrt(8 / math.pi)), tl.constexpr(0.044715 * math.sqrt(8 / math.pi))
_A2, _B2 = tl.constexpr(_A.value * math.log2(math.e)), tl.constexpr(_B.value * math.log2(math.e))


@triton.jit
def _times_sigmoid(x, z):
    """x * sigmoid(z ln 2)."""
    return x / (1 + tl.exp2(-z))


@triton.jit
def _sigmoid_and_slope(x):
    """sigmoid(x) and sigmoid(x) * (1 - sigmoid(x)), both to full precision where they are small."""
    e = tl.exp2(-tl.abs(x) * _LOG2_E)
    larger = 1 / (1 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), larger * smaller


@triton.jit
def _tanh(x):
    # Near 0 the quotient below would cancel: there x + x^3 P(x^2), whose relative error is 1.5e-8 up to 0.5.
    t = x * x
    near = x + x * t * (-0.33333144 + t * (0.13325878 + t * (-0.05304542 + t * 0.01724131)))
    e = tl.exp2(-2 * _LOG2_E * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation NAME of float32 x; None: x."""
    if NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new":
        x = _times_sigmoid(x, x * (_A2 + _B2 * (x * x)))
    elif NAME == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif NAME == "silu":
        x = _times_sigmoid(x, x * _LOG2_E)
    elif NAME == "tanh":
        x = _tanh(x)
    else:
        tl.static_assert(NAME is None, "an activation that is not in ACTIVATIONS")
    return x


@triton.jit
def activation_slope(x, NAME: tl.constexpr):
    """The derivative of the activation NAME at float32 x; None: 1. relu's at 0 is 0, as torch has it."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp2(-0.5 * _LOG2_E * (x * x))
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_new":
        t = x * x
        value, flat = _sigmoid_and_slope(x * (_A + _B * t))
        # Where the sigmoid is flat, the square may be infinite.
        slope = value + x * tl.where(flat == 0, 0.0, flat * (_A + 3 * _B * t))
    elif NAME == "relu":
        slope = tl.where(x <= 0, 0.0, tl.where(x > 0, 1.0, x))
    elif NAME == "silu":
        value, flat = _sigmoid_and_slope(x)
        slope = value + x * flat
    elif NAME == "tanh":
        _value, flat = _sigmoid_and_slope(2 * x)
        slope = 4 * flat
    else:
        tl.static_assert(NAME is None, "an activation that is not in ACTIVATIONS")
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
