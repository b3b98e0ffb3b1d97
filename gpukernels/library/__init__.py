"""Every op as a torch op (`torch.ops.gpukernels.*`) that runs the Triton kernels, with its gradient.

`gpukernels.ops` has the contracts and has checked the arguments. Each op works under `torch.compile`,
on fake tensors and with autograd; on CPU tensors it runs plain torch, or the kernels where Triton
interprets them (TRITON_INTERPRET=1).
"""

from gpukernels.library.embedding import embedding
from gpukernels.library.norm import layer_norm, rms_norm
from gpukernels.library.pointwise import gelu, swiglu
from gpukernels.library.rope import rope

__all__ = ["embedding", "gelu", "layer_norm", "rms_norm", "rope", "swiglu"]
