"""Rotary position embedding."""

import torch


def default_frequencies(theta, width):
    """(width / 2,) float32 on the CPU, bit for bit what transformers computes there."""
    return 1.0 / theta ** (torch.arange(0, width, 2, device="cpu").float() / width)


def rope(x, positions, *, theta=10000.0, frequencies=None, interleaved=False):
    if frequencies is None:
        frequencies = default_frequencies(theta, x.shape[-1]).to(x.device)
    compute = torch.promote_types(x.dtype, torch.float32)
    # The angle is a float32 number in float64 too: its rounding is part of what the op means.
    angle = (positions[..., None].float() * frequencies.detach())[:, :, None].to(compute)  # (B, T, 1, R/2)
    cos, sin = angle.cos(), angle.sin()
    width = 2 * len(frequencies)
    turning, rest = x[..., :width].to(compute), x[..., width:].to(compute)
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)
