"""Every op as a torch op (`torch.ops.gpukernels.*`) that runs the Triton kernels, with its gradient.

`gpukernels.ops` has the contracts and has checked the arguments. Each op works under `torch.compile`,
on fake tensors and with autograd; on CPU tensors it runs plain torch, or the kernels where Triton
interprets them (TRITON_INTERPRET=1).
"""

from gpukernels.library.attention import attention, packed_attention
from gpukernels.library.cached_attention import cached_attention
from gpukernels.library.decode_attention import decode_attention
from gpukernels.library.embedding import embedding
from gpukernels.library.linear_loss import linear_cross_entropy
from gpukernels.library.loss import cross_entropy, cross_entropy_with_gradient
from gpukernels.library.matmul import linear, matmul, norm_linear
from gpukernels.library.norm import layer_norm, rms_norm
from gpukernels.library.optimizer import adamw
from gpukernels.library.pointwise import gelu, swiglu
from gpukernels.library.rope import rope
from gpukernels.library.sampling import sample, sample_embed, uniform
