"""Every op in plain PyTorch, on any torch device, with gradients.

These are the baseline of the benchmarks and, in float64, the truth of the kernel tests, so they say
what is meant in the fewest steps. `gpukernels.ops` has the contracts and has checked the arguments.
"""

from gpukernels.torch_ops.attention import attention, cached_attention, decode_attention, packed_attention
from gpukernels.torch_ops.linear_loss import linear_cross_entropy
from gpukernels.torch_ops.loss import cross_entropy, cross_entropy_with_gradient
from gpukernels.torch_ops.matmul import linear, matmul, norm_linear
from gpukernels.torch_ops.norm import layer_norm, rms_norm
from gpukernels.torch_ops.optimizer import adamw
from gpukernels.torch_ops.pointwise import embedding, gelu, swiglu
from gpukernels.torch_ops.rope import rope
from gpukernels.torch_ops.sampling import sample, sample_embed, uniform
