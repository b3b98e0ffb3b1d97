"""Matrix products, and what is fused with them."""

import torch
import torch.nn.functional as F

from gpukernels.torch_ops.norm import layer_norm, rms_norm
from gpukernels.torch_ops.pointwise import ACTIVATIONS, widen


def linear(x, weight, bias=None, *, activation=None, residual=None):
    y = F.linear(x, *widen(x.dtype, weight, bias))
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.to(x.dtype)


def norm_linear(
    x, norm_weight, norm_bias, weight, bias=None, *, norm="layer", eps=1e-5, activation=None, with_x=False
):  # fmt: skip
    h = rms_norm(x, norm_weight, eps=eps) if norm == "rms" else layer_norm(x, norm_weight, norm_bias, eps=eps)
    y = linear(h, weight, bias, activation=activation)
    return (y, x) if with_x else y


def matmul(a, b):
    return torch.matmul(a, b)
