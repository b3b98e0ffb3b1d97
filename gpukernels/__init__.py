"""Kernels for transformers: one op, one meaning, an implementation for every kind of array.

`gpukernels.ops` is the place to start reading: it holds what each op means and checks. A NumPy
array runs `numpy_ops`, a CUDA tensor the Triton kernels (through `library`), any other tensor
`torch_ops`, a CuPy array what its tensor would (`interop`). Importing this package imports no torch.
"""

from gpukernels.ops import (
    ACTIVATIONS,
    adamw,
    attention,
    cached_attention,
    cross_entropy,
    cross_entropy_with_gradient,
    decode_attention,
    embedding,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    matmul,
    norm_linear,
    packed_attention,
    rms_norm,
    rope,
    sample,
    sample_embed,
    swiglu,
    uniform,
)

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

__version__ = "0.1.0"
