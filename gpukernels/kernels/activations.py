"""The activations of a product's epilogue, on float32 values in registers.

No libdevice: the interpreter has none.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    # exp(2 z) may become infinite: then this is 1. Near 0 it would cancel; there a series is right to 2e-8 of z.
    far = 1 - 2 / (tl.exp(2 * z) + 1)
    s = z * z
    near = z * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(s < 0.0625, near, far)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation NAME (of `gpukernels.ops.checks.ACTIVATIONS`, or None) of float32 z."""
    if NAME == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_new":
        z = 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif NAME == "relu":
        z = tl.where(z > 0, z, 0.0)
    elif NAME == "silu":
        z = z / (1 + tl.exp(-z))
    elif NAME == "tanh":
        z = _tanh(z)
    else:
        tl.static_assert(NAME is None, "an activation that is not here")
    return z
