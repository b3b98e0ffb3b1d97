"""Attention with all scores in memory."""

import math

import torch


def attention(
    q, k, v, *, causal=True, window=None, lengths=None, documents=None, scale=None, return_lse=False
):  # fmt: skip
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
    if documents is not None:
        # Runs of equal numbers, counted.
        run = torch.cat([torch.zeros_like(documents[:, :1]), documents.diff(dim=1) != 0], 1).cumsum(1)
        visible = visible & (run.gather(1, position.clamp(0, keys - 1).long())[..., None] == run[:, None])
    visible = visible[:, None]

    q, k, v = (array.to(compute).transpose(1, 2) for array in (q, k, v))  # (B, H, T, D)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # A cache may hold anything past a row's length, and 0 * inf is NaN: such values must not be read.
    used = (key < lengths[:, None])[:, None, :, None]
    k, v = k.masked_fill(~used, 0), v.masked_fill(~used, 0)
    scores = (q * scale) @ k.transpose(2, 3)
    # A query that sees nothing would be NaN after softmax: give it finite scores, then zeros.
    sees = visible.any(-1, keepdim=True)
    scores = torch.where(visible, scores, -torch.inf)
    scores = torch.where(sees, scores, 0)
    weights = torch.where(visible, torch.softmax(scores, -1), 0)
    out = (weights @ v).transpose(1, 2).contiguous().to(dtype)
    if not return_lse:
        return out
    return out, torch.where(sees[..., 0], torch.logsumexp(scores, -1), -torch.inf).expand(batch, heads, new)


def decode_attention(q, k, v, lengths, *, window=None, scale=None):
    return attention(q[:, None], k, v, window=window, lengths=lengths, scale=scale)[:, 0]


def cached_attention(q, k, v, keys, values, lengths, *, window=None, scale=None, arrivals=None):
    new = k.shape[1]
    place = lengths[:, None] - new + torch.arange(new, device=q.device)  # (B, N)
    inside = (place >= 0) & (place < keys.shape[1])
    row = torch.arange(len(q), device=q.device)[:, None].expand_as(place)
    for cache, each in ((keys, k), (values, v)):
        cache[row[inside], place[inside].long()] = each[inside]
    return attention(q, keys, values, window=window, lengths=lengths, scale=scale)
