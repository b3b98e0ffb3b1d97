"""Every op in plain PyTorch, on any torch device, with gradients.

These are the baseline of the benchmarks and, in float64, the truth of the kernel tests, so they say
what is meant in the fewest steps. `gpukernels.ops` has the contracts and has checked the arguments.
"""

import math

import torch
import torch.nn.functional as F

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def _as(dtype, *arrays):
    """The arrays in `dtype`: the widening of narrower storage, exact and without a copy if equal."""
    return [None if array is None else array.to(dtype) for array in arrays]


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    total = x if residual is None else x + residual.to(x.dtype)
    weight, bias = _as(x.dtype, weight, bias)
    y = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return y if residual is None else (y, total)


def linear(x, weight, bias=None, *, activation=None, residual=None):
    y = F.linear(x, *_as(x.dtype, weight, bias))
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.to(x.dtype)


def norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    return linear(layer_norm(x, norm_weight, norm_bias, eps=eps), weight, bias, activation=activation)


def matmul(a, b):
    return torch.matmul(a, b)


def attention(q, k, v, *, causal=True, window=None, lengths=None, scale=None):
    batch, new, heads, width = q.shape
    keys = k.shape[1]
    group = heads // k.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)

    if lengths is None:
        lengths = torch.full((batch,), keys, dtype=torch.int64, device=q.device)
    position = lengths[:, None] - new + torch.arange(new, device=q.device)  # (B, T)
    key = torch.arange(keys, device=q.device)
    visible = (key < lengths[:, None])[:, None] & (position >= 0)[..., None]  # (B, T, S)
    if causal:
        visible = visible & (key <= position[..., None])
    if window is not None:
        visible = visible & (key > position[..., None] - window)
    visible = visible[:, None]

    q, k, v = (array.to(compute).transpose(1, 2) for array in (q, k, v))  # (B, H, T, D)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # A cache may hold anything past a row's length, and 0 * inf is NaN: such values must not be read.
    v = v.masked_fill((key >= lengths[:, None])[:, None, :, None], 0)
    scores = (q * scale) @ k.transpose(2, 3)
    # A query that sees nothing would be NaN after softmax: give it finite scores, then zeros.
    scores = torch.where(visible, scores, -torch.inf)
    scores = torch.where(visible.any(-1, keepdim=True), scores, 0)
    weights = torch.where(visible, torch.softmax(scores, -1), 0)
    return (weights @ v).transpose(1, 2).contiguous().to(dtype)


def embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    dtype = weight.dtype if dtype is None else dtype
    y = F.embedding(ids, weight).to(dtype)
    if positions is None:
        return y
    return y + F.embedding(positions, position_weight).to(dtype)
