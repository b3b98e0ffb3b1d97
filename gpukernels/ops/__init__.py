"""The public ops: what each one means, what it accepts, and one call to what runs it.

The type and device of the arrays choose the implementation: `np.ndarray` runs `numpy_ops` (which
imports NumPy only), a CUDA tensor of up to 32 bits runs the Triton kernels, any other tensor
`torch_ops`, CuPy's arrays what their tensors would. Nothing else does: no global switch, no
environment variable of ours. Every check stands here, before anything is allocated, so that all
implementations accept and refuse the same calls with the same words.

Dimensions: B batch, T new positions, S key positions, H query heads, Hkv key-value heads, D head
width, C model width, V vocabulary; matrices M, N, K. Weights are (out, in), as torch has them; any
strides will do. Inputs are float16, float32, float64 (and bfloat16 for torch); statistics, sums and
softmax are computed in float32 at least, and a result has the dtype of `x` (or `a`, or `q`).
A weight may be narrower than `x` (float16 storage under float32 activations): it is widened, exactly,
as it is used.
"""

from gpukernels.ops.attention import attention, cached_attention, decode_attention, packed_attention
from gpukernels.ops.checks import ACTIVATIONS
from gpukernels.ops.loss import cross_entropy, cross_entropy_with_gradient, linear_cross_entropy
from gpukernels.ops.matmul import linear, matmul, norm_linear
from gpukernels.ops.norm import layer_norm, rms_norm
from gpukernels.ops.optimizer import adamw
from gpukernels.ops.pointwise import embedding, gelu, swiglu
from gpukernels.ops.rope import rope
from gpukernels.ops.sampling import sample, sample_embed, uniform

__all__ = [
    "ACTIVATIONS",
    "adamw",
    "attention",
    "cached_attention",
    "cross_entropy",
    "cross_entropy_with_gradient",
    "decode_attention",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "matmul",
    "norm_linear",
    "packed_attention",
    "rms_norm",
    "rope",
    "sample",
    "sample_embed",
    "swiglu",
    "uniform",
]
