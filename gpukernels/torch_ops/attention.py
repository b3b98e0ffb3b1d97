"""Attention with all scores in memory, but for what torch's own attention of the CPU can do."""

import math

import torch
import torch.nn.functional as F


def attention(
    q, k, v, *, causal=True, window=None, lengths=None, documents=None, scale=None, return_lse=False
):  # fmt: skip
    batch, new, keys, dtype = *q.shape[:2], k.shape[1], q.dtype
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale

    simple = causal and window is None and lengths is None and not return_lse and keys == new > 0 < batch
    if simple and dtype == torch.float32 and q.device.type == "cpu":
        if documents is None:
            return _causal(q, k, v, scale)
        if not torch.compiler.is_compiling():  # a graph cannot have as many parts as there are documents
            return _by_document(q, k, v, documents, scale)
    if causal and documents is None and not return_lse and batch and _inference(q, k, v):
        in_use = [keys] * batch if lengths is None else lengths.tolist()
        if 0 <= min(in_use) <= max(in_use) <= keys:
            return torch.stack([_row(*row, window, scale) for row in zip(q, k, v, in_use, strict=True)])
    if lengths is None:
        lengths = torch.full((batch,), keys, dtype=torch.int64, device=q.device)
    out, lse = _by_scores(q, k, v, lengths, documents, causal, window, scale)
    return (out, lse) if return_lse else out


def _by_scores(q, k, v, lengths, documents, causal, window, scale):
    """The formula, for all rows at once: the result, and the log-sum-exp."""
    batch, new, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
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
    return out, torch.where(sees[..., 0], torch.logsumexp(scores, -1), -torch.inf).expand(batch, heads, new)


def _causal(q, k, v, scale):
    """What a step of training on the CPU asks: half of the scores, and none of them stored."""
    q, k, v = (array.transpose(1, 2) for array in (q, k, v))
    grouped = False
    if q.shape[1] != k.shape[1]:  # asked, for a comparison alone is open where a graph leaves the sizes open
        grouped = True
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _inference(*arrays: torch.Tensor) -> bool:
    """Whether nothing differentiates, and lengths may be looked at: on the CPU a row is as much work as it is long."""
    narrow = arrays[0].device.type == "cpu" and arrays[0].dtype != torch.float64
    gradient = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
    return narrow and not gradient and not _watched(arrays[0])


def _watched(array: torch.Tensor) -> bool:
    """Whether someone reads along, for whom lengths have no values, or may have others later: a trace, `torch.func`."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack()
    fake = type(array) not in (torch.Tensor, torch.nn.Parameter)
    return bool(tracing) or fake or torch._C._are_functorch_transforms_active()


def _row(q, k, v, length, window, scale):
    """One row: queries (T, H, D), of which the last ones are the tail of the `length` keys in use; (T, H, D)."""
    out = _tail(q, k, v, length, window, scale)
    if len(q) > 1 and out.isnan().any():  # torch adds its mask: an infinite key that it hides makes a NaN, too
        lengths = torch.tensor([length], device=q.device)
        return _by_scores(q[None], k[None], v[None], lengths, None, True, window, scale)[0][0]
    return out


def _tail(q, k, v, length, window, scale):
    """The same, by torch's own attention."""
    new = min(len(q), length)
    first = 0 if window is None else max(0, length - new - window + 1)  # the first key that any query sees
    compute = torch.promote_types(q.dtype, torch.float32)
    queries, k, v = (
        each.to(compute).transpose(0, 1)[None] for each in (q[len(q) - new :], k[first:length], v[first:length])
    )
    if new == 1:  # the query heads of a key-value head as so many queries, which copies no keys
        out = F.scaled_dot_product_attention(queries.reshape(1, k.shape[1], -1, q.shape[2]), k, v, scale=scale)
        out = out.reshape(1, *q.shape[1:])
    else:
        keys, mask = length - first, None
        if new < keys or (window is not None and window < new):
            mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril_(keys - new)
            if window is not None:
                mask.triu_(keys - new - window + 1)
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
        out = F.scaled_dot_product_attention(queries, k, v, scale=scale, **options)[0].transpose(0, 1)
    return out.to(q.dtype) if new == len(q) else torch.cat([torch.zeros_like(q[: len(q) - new]), out.to(q.dtype)])


def _by_document(q, k, v, documents, scale):
    """Each run by itself: what is in another is not even multiplied by 0."""
    batch, new = documents.shape
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    starts = torch.cat([first, documents.diff(dim=1) != 0], 1).flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([batch * new])).tolist()
    if len(lengths) == batch:  # one document a row
        return _causal(q, k, v, scale)
    # Split once, so that the gradient is joined once.
    parts = zip(*(array.flatten(0, 1).split(lengths) for array in (q, k, v)), strict=True)
    return torch.cat([_causal(*(part[None] for part in three), scale)[0] for three in parts]).view(q.shape)


def packed_attention(qkv, *, causal=True, window=None, documents=None, scale=None):
    # The gradient of unbind writes qkv's once; that of three slices would thrice.
    return attention(*qkv.unbind(2), causal=causal, window=window, documents=documents, scale=scale)


def decode_attention(q, k, v, lengths, *, window=None, scale=None):
    return attention(q[:, None], k, v, window=window, lengths=lengths, scale=scale)[:, 0]


def cached_attention(q, k, v, keys, values, lengths, *, window=None, scale=None, arrivals=None):
    new = k.shape[1]
    if _inference(q, k, v):
        for row, length in enumerate(lengths.tolist()):
            first, start = length - new, max(0, length - new)
            stop = max(start, min(length, keys.shape[1]))
            keys[row, start:stop] = k[row, start - first : stop - first]
            values[row, start:stop] = v[row, start - first : stop - first]
    else:
        place = lengths[:, None] - new + torch.arange(new, device=q.device)  # (B, N)
        inside = (place >= 0) & (place < keys.shape[1])
        row = torch.arange(len(q), device=q.device)[:, None].expand_as(place)
        for cache, each in ((keys, k), (values, v)):
            cache[row[inside], place[inside].long()] = each[inside]
    return attention(q, keys, values, window=window, lengths=lengths, scale=scale)
