"""`decode_attention` as a torch op, without a gradient: it is what generating asks for."""

import math

from gpukernels import torch_ops
from gpukernels.kernels.attention.decode import decode_attention as launch
from gpukernels.library.registry import define, empty


def _plain(q, k, v, lengths, window, scale):
    return torch_ops.decode_attention(q, k, v, lengths, window=window, scale=scale).contiguous()


def _fake(q, k, v, lengths, window, scale):
    return empty(q, *q.shape)


_decode_attention = define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, SymInt? window, float scale) -> Tensor",
    launch=launch,
    plain=_plain,
    fake=_fake,
)


def decode_attention(q, k, v, lengths, *, window=None, scale=None):
    return _decode_attention(q, k, v, lengths, window, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
