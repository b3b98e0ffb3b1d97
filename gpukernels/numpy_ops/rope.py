"""Rotary position embedding."""

import numpy as np

from gpukernels.numpy_ops.blocks import compute_dtype


def rope(x, positions, *, theta=10000.0, frequencies=None, interleaved=False):
    if frequencies is None:
        frequencies = _default_frequencies(theta, x.shape[-1])
    compute = compute_dtype(x.dtype)
    # The angle is a float32 number in float64 too: its rounding is part of what the op means.
    angle = positions[..., None].astype(np.float32) * frequencies
    angle = angle[:, :, None].astype(compute, copy=False)  # (B, T, 1, R/2)
    cos, sin = np.cos(angle), np.sin(angle)
    half = len(frequencies)
    y = np.empty(x.shape, x.dtype)
    y[..., 2 * half :] = x[..., 2 * half :]
    one, other = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    a, b = x[..., one].astype(compute, copy=False), x[..., other].astype(compute, copy=False)
    # float16 of more than 65504 is infinite
    y[..., one] = a * cos - b * sin
    y[..., other] = b * cos + a * sin
    return y


def _default_frequencies(theta: float, width: int) -> np.ndarray:
    """(width / 2,) float32, as transformers rounds it; the power, made in float64, is as close as float32 gets.

    torch's own float32 power misses that by one unit in the last place at about one exponent in a hundred.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.power(np.float32(theta), exponents, dtype=np.float64).astype(np.float32)
