"""Every op in plain PyTorch, on any torch device, with gradients.

These are the baseline of the benchmarks and, in float64, the truth of the kernel tests, so they say
what is meant in the fewest steps. `gpukernels.ops` has the contracts and has checked the arguments.
"""

from gpukernels.torch_ops.attention import attention
from gpukernels.torch_ops.matmul import linear, matmul, norm_linear
from gpukernels.torch_ops.norm import layer_norm, rms_norm
from gpukernels.torch_ops.pointwise import embedding, gelu, swiglu
from gpukernels.torch_ops.rope import rope

__all__ = [
    "attention",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "matmul",
    "norm_linear",
    "rms_norm",
    "rope",
    "swiglu",
]
