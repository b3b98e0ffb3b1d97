"""`attention` and `packed_attention` as torch ops, which return the result and the log-sum-exp that backward ops need.

One query a row over a cache, without a gradient, goes to `decode_attention`.
"""

import math

import torch

from gpukernels.kernels.attention.backward import attention_backward
from gpukernels.kernels.attention.blocks import document_bounds
from gpukernels.kernels.attention.forward import attention_forward
from gpukernels.library.decode_attention import decode_attention
from gpukernels.library.registry import autocast, define, differentiate, empty, wants_gradient
from gpukernels.torch_ops.attention import attention as plain_attention
from gpukernels.torch_ops.attention import packed_attention as plain_packed_attention

WIDEST = 256  # wider heads run plain torch


def _bounds_launch(documents):
    return document_bounds(documents)


def _bounds_plain(documents):
    batch, keys = documents.shape
    index = torch.arange(keys, device=documents.device).expand(batch, keys)
    differs = documents.diff(dim=1) != 0
    edge = differs.new_ones((batch, min(1, keys)))
    starts = torch.where(torch.cat([edge, differs], 1), index, 0).cummax(1).values
    ends = torch.where(torch.cat([differs, edge], 1), index + 1, keys).flip(1).cummin(1).values.flip(1)
    return torch.stack([starts, ends], 1).int()


def _bounds_fake(documents):
    return empty(documents, documents.shape[0], 2, documents.shape[1], dtype=torch.int32)


_document_bounds = define(
    "document_bounds(Tensor documents) -> Tensor", launch=_bounds_launch, plain=_bounds_plain, fake=_bounds_fake
)


def _launch(q, k, v, lengths, bounds, scale, causal, window):
    return attention_forward(q, k, v, lengths, bounds, scale, causal=causal, window=window)


def _plain(q, k, v, lengths, bounds, scale, causal, window):
    documents = None if bounds is None else bounds[:, 0]  # the same for all of a document, and for no other
    out, lse = plain_attention(
        q,
        k,
        v,
        causal=causal,
        window=window or None,
        lengths=lengths,
        documents=documents,
        scale=scale,
        return_lse=True,
    )
    return out, lse.float().contiguous()


def _fake(q, k, v, lengths, bounds, scale, causal, window):
    batch, new, heads, _ = q.shape
    return empty(q, *q.shape), empty(q, batch, heads, new, dtype=torch.float32)


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? bounds, float scale, bool causal, int window) "
    "-> (Tensor, Tensor)",
    launch=_launch,
    plain=_plain,
    fake=_fake,
)


def _backward_launch(dout, dlse, q, k, v, out, lse, lengths, bounds, scale, causal, window, needs):
    return attention_backward(
        dout, dlse, q, k, v, out, lse, lengths, bounds, scale, causal=causal, window=window, needs=needs
    )


def _backward_plain(dout, dlse, q, k, v, out, lse, lengths, bounds, scale, causal, window, needs):
    """The formulas of `kernels/attention/backward.py` with all scores in memory; p = exp(scores - lse)."""
    (batch, new, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    if lengths is None:
        lengths = torch.full((batch,), keys, device=q.device)
    key = torch.arange(keys, device=q.device)
    position = (lengths[:, None] - new + torch.arange(new, device=q.device))[..., None]
    visible = (key < lengths[:, None, None]) & (position >= 0)
    if causal:
        visible = visible & (key <= position)
    if window:
        visible = visible & (key > position - window)
    if bounds is not None:
        start = bounds[:, 0]
        visible = visible & (start.gather(1, position[..., 0].clamp(0, keys - 1))[..., None] == start[:, None])
    used = (key < lengths[:, None])[:, None, :, None]
    wide_q, wide_out, wide_dout = (x.float().transpose(1, 2) for x in (q, out, dout))
    wide_k, wide_v = (
        x.float().transpose(1, 2).masked_fill(~used, 0).repeat_interleave(heads // kv_heads, 1) for x in (k, v)
    )
    scores = torch.where(visible[:, None], scale * wide_q @ wide_k.mT, -torch.inf)
    p = torch.where(visible[:, None], (scores - lse[..., None]).exp(), 0)
    delta = (wide_dout * wide_out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = p * (wide_dout @ wide_v.mT - delta) * scale
    by_group = (batch, kv_heads, heads // kv_heads, keys, -1)
    dq = ds @ wide_k
    dk = (ds.mT @ wide_q).reshape(by_group).sum(2)
    dv = (p.mT @ wide_dout).reshape(by_group).sum(2)
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk, dv))
    none = (empty(q, 0) for _ in range(3))
    kv = needs[1] or needs[2]
    return tuple(x if need else next(none) for x, need in ((dq, needs[0]), (dk, kv), (dv, kv)))


def _backward_fake(dout, dlse, q, k, v, out, lse, lengths, bounds, scale, causal, window, needs):
    kv = needs[1] or needs[2]
    return tuple(empty(q, *(x.shape if need else (0,))) for x, need in ((q, needs[0]), (k, kv), (v, kv)))


_attention_backward = define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? lengths, Tensor? bounds, float scale, bool causal, int window, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    launch=_backward_launch,
    plain=_backward_plain,
    fake=_backward_fake,
)


def _save(ctx, inputs, output):
    q, k, v, lengths, bounds, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, lengths, bounds)


def _differentiated(ctx, dout, dlse):
    q, k, v, out, lse, lengths, bounds = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    needs = ctx.needs_input_grad[:3]
    gradients = _attention_backward(dout, dlse, q, k, v, out, lse, lengths, bounds, *ctx.options, needs)
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), *[None] * 5


differentiate(_attention, _save, _differentiated)


def _packed_launch(qkv, bounds, scale, causal, window):
    return attention_forward(*qkv.unbind(2), None, bounds, scale, causal=causal, window=window)


def _packed_plain(qkv, bounds, scale, causal, window):
    return _plain(*qkv.unbind(2), None, bounds, scale, causal, window)


def _packed_fake(qkv, bounds, scale, causal, window):
    return _fake(qkv[:, :, 0], None, None, None, bounds, scale, causal, window)


def _packed_backward_launch(dout, qkv, out, lse, bounds, scale, causal, window):
    dqkv, needs = empty(qkv, *qkv.shape), (True,) * 3
    options = {"causal": causal, "window": window, "needs": needs, "into": dqkv.unbind(2)}
    attention_backward(dout, None, *qkv.unbind(2), out, lse, None, bounds, scale, **options)
    return dqkv


def _packed_backward_plain(dout, qkv, out, lse, bounds, scale, causal, window):
    options = (None, bounds, scale, causal, window, (True,) * 3)
    return torch.stack(_backward_plain(dout, None, *qkv.unbind(2), out, lse, *options), 2)


_packed_attention = define(
    "packed_attention(Tensor qkv, Tensor? bounds, float scale, bool causal, int window) -> (Tensor, Tensor)",
    launch=_packed_launch,
    plain=_packed_plain,
    fake=_packed_fake,
)
_packed_attention_backward = define(
    "packed_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? bounds, float scale, "
    "bool causal, int window) -> Tensor",
    launch=_packed_backward_launch,
    plain=_packed_backward_plain,
    fake=lambda dout, qkv, out, lse, bounds, scale, causal, window: empty(qkv, *qkv.shape),
)


def _save_packed(ctx, inputs, output):
    qkv, bounds, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, bounds)


def _differentiated_packed(ctx, dout, _dlse):
    return _packed_attention_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None


differentiate(_packed_attention, _save_packed, _differentiated_packed)


def attention(
    q, k, v, *, causal=True, window=None, lengths=None, documents=None, scale=None, return_lse=False
):  # fmt: skip
    q, k, v = autocast(q, k, v)
    if q.shape[3] > WIDEST:
        options = {"window": window, "lengths": lengths, "documents": documents, "scale": scale}
        return plain_attention(q, k, v, causal=causal, **options, return_lse=return_lse)
    decodes = q.shape[1] == 1 and causal and lengths is not None and documents is None and not return_lse
    if decodes and not wants_gradient(q, k, v):
        return decode_attention(q[:, 0], k, v, lengths, window=window, scale=scale)[:, None]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    bounds = None if documents is None else _document_bounds(documents)
    out, lse = _attention(q, k, v, lengths, bounds, scale, causal, window or 0)
    return (out, lse) if return_lse else out


def packed_attention(qkv, *, causal=True, window=None, documents=None, scale=None):
    (qkv,) = autocast(qkv)
    width = qkv.shape[4]
    if width > WIDEST:
        return plain_packed_attention(qkv, causal=causal, window=window, documents=documents, scale=scale)
    scale = 1 / math.sqrt(width) if scale is None else scale
    bounds = None if documents is None else _document_bounds(documents)
    return _packed_attention(qkv, bounds, scale, causal, window or 0)[0]
