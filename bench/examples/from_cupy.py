"""Kernels called from CuPy: on CuPy's stream, without a copy. On NumPy where CuPy has no GPU."""

import gpukernels

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception as fault:  # no CuPy, no driver, no GPU: each says it in its own way
    import numpy as xp

    print(f"CuPy has no GPU here ({type(fault).__name__}); the same calls on NumPy:")

x = xp.arange(64 * 768).reshape(64, 768).astype("float32")
weight, bias = xp.ones(768, "float32"), xp.zeros(768, "float32")

y = gpukernels.layer_norm(x, weight, bias)  # the caller's kind of array comes back
y = gpukernels.gelu(y)

print(f"{type(y).__module__.split('.')[0]} {y.shape} {y.dtype}, largest {float(y.max()):.4f}")
