"""Every op on `np.ndarray`: the CPU runtime. Imports NumPy only.

`gpukernels.ops` has the contracts and has checked the arguments. What counts here: a decode step is
matrix-vector products at the speed of memory, so nothing else may touch a weight-sized array; in
prefill the products are BLAS's, so what stands between them works in place, on blocks of rows that
stay in a core's cache.

What overflows is infinite and what comes of that NaN, as on every other device, and is no warning of NumPy's.
"""

import numpy as np

from gpukernels.numpy_ops.attention import attention, cached_attention, decode_attention, packed_attention
from gpukernels.numpy_ops.loss import cross_entropy, cross_entropy_with_gradient, linear_cross_entropy
from gpukernels.numpy_ops.matmul import linear, matmul, norm_linear
from gpukernels.numpy_ops.norm import layer_norm, rms_norm
from gpukernels.numpy_ops.optimizer import adamw
from gpukernels.numpy_ops.pointwise import embedding, gelu, swiglu
from gpukernels.numpy_ops.rope import rope
from gpukernels.numpy_ops.sampling import sample, sample_embed, uniform

for _name, _op in list(globals().items()):
    if callable(_op):
        globals()[_name] = np.errstate(all="ignore")(_op)  # for a microsecond
