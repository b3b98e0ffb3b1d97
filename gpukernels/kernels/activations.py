"""The activations of `gpukernels.ops.ACTIVATIONS` and their derivatives, on float32 values inside kernels.

    gelu      x / 2 * (1 + erf(x / sqrt(2)))          Hendrycks and Gimpel, arXiv 1606.08415
    gelu_new  x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)          its tanh form
    relu      max(x, 0)
    silu      x * sigmoid(x)
    tanh      tanh(x)

Exponents are never positive, so nothing overflows, and no small difference of large numbers is taken. A NaN
stays one. Written with what Triton itself has (its interpreter has no CUDA library).
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _sigmoid_slope(x):
    """sigmoid(x) * (1 - sigmoid(x)), to full precision where one of the factors is small."""
    e = tl.exp(-tl.abs(x))
    return e / ((1 + e) * (1 + e))


@triton.jit
def _tanh(x):
    # Near 0 the quotient below would cancel: there x + x^3 P(x^2), whose relative error is 1.5e-8 up to 0.5.
    t = x * x
    near = x + x * t * (-0.33333144 + t * (0.13325878 + t * (-0.05304542 + t * 0.01724131)))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation NAME of float32 x; None: x."""
    if NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new":
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif NAME == "silu":
        x = x * _sigmoid(x)
    elif NAME == "tanh":
        x = _tanh(x)
    else:
        tl.static_assert(NAME is None, "an activation that is not in ACTIVATIONS")
    return x


@triton.jit
def activation_slope(x, NAME: tl.constexpr):
    """The derivative of the activation NAME at float32 x; None: 1. relu's at 0 is 0, as torch has it."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_new":
        w = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        inner = 1.5957691216057308 * (1 + 0.134145 * x * x)
        slope = _sigmoid(w) + x * _sigmoid_slope(w) * inner
    elif NAME == "relu":
        slope = tl.where(x <= 0, 0.0, tl.where(x > 0, 1.0, x))
    elif NAME == "silu":
        slope = _sigmoid(x) + x * _sigmoid_slope(x)
    elif NAME == "tanh":
        slope = 4 * _sigmoid_slope(2 * x)
    else:
        tl.static_assert(NAME is None, "an activation that is not in ACTIVATIONS")
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
