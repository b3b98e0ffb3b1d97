"""Norms over the last dimension."""

import torch
import torch.nn.functional as F

from gpukernels.torch_ops.pointwise import widen


def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):
    total = x if residual is None else x + residual.to(x.dtype)
    weight, bias = widen(x.dtype, weight, bias)
    y = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return y if residual is None else (y, total)


def rms_norm(x, weight, *, eps=1e-6, residual=None):
    total = x if residual is None else x + residual.to(x.dtype)
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)
