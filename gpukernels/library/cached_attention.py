"""`cached_attention` as a torch op that writes its cache, without a gradient: it is what generating asks for."""

import math

from gpukernels import torch_ops
from gpukernels.kernels.attention.append import append
from gpukernels.kernels.attention.decode import decode_attention
from gpukernels.kernels.attention.forward import attention_forward
from gpukernels.library.attention import WIDEST
from gpukernels.library.registry import define, empty


def _launch(q, k, v, keys, values, lengths, window, scale, arrivals):
    if q.shape[1] == k.shape[1] == 1:
        new = {"new_k": k[:, 0], "new_v": v[:, 0], "arrivals": arrivals}
        return decode_attention(q[:, 0], keys, values, lengths, window, scale, **new)[:, None]
    append(k, v, keys, values, lengths)
    return attention_forward(q, keys, values, lengths, None, scale, causal=True, window=window or 0)[0]


def _plain(q, k, v, keys, values, lengths, window, scale, arrivals):
    return torch_ops.cached_attention(q, k, v, keys, values, lengths, window=window, scale=scale).contiguous()


def _fake(q, k, v, keys, values, lengths, window, scale, arrivals):
    return empty(q, *q.shape)


_cached_attention = define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "SymInt? window, float scale, Tensor(c!)? arrivals) -> Tensor",
    launch=_launch,
    plain=_plain,
    fake=_fake,
)


def cached_attention(q, k, v, keys, values, lengths, *, window=None, scale=None, arrivals=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.shape[-1] > WIDEST:
        return torch_ops.cached_attention(q, k, v, keys, values, lengths, window=window, scale=scale)
    return _cached_attention(q, k, v, keys, values, lengths, window, scale, arrivals)
