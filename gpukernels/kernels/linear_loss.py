"""Cross entropy of linear logits, a chunk of tokens at a time: all logits are never stored.

    for each chunk of tokens, in order:
        logits   = hidden @ weight^T                       (chunk, V), in the inputs' dtype
        loss, dlogits over the logits, of the losses' sum  one launch of `kernels.loss`
        dhidden  = dlogits @ weight
        dweight += dlogits^T @ hidden                      float32

The gradients are made in the forward pass, where the logits are at hand, and without the mean's divisor: what
is rounded to 16 bits is p - [j = t], not that over thousands of tokens. The backward pass multiplies them by
the upstream gradient over the divisor, in float32, before they are rounded to their dtype. Losses that are not
added up have an upstream gradient each, known only later: then the backward pass makes the logits again.

Cost, M tokens, C wide, V words, b bytes: 6 M C V flops with both gradients (8 for losses that are not added
up), and 4 M V b of traffic for the logits beside the products' own. Memory: the logits of one chunk, 4 V C
bytes for dweight and b M C for dhidden. At 8192 x 768 x 50304 in bfloat16 that is 206 + 155 + 13 MB, where the
logits and their gradient at once would be 1648 MB. Not yet measured.

Hsu et al. (Liger Kernel), arXiv 2410.10989; Wijmans et al., arXiv 2411.09009.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, rows
from gpukernels.kernels.loss import divisor_of, empty_rows, losses, total_of
from gpukernels.kernels.matmul import long_product, product

# Logits at a time: a quarter of all, within these bytes. Each chunk reads and writes the whole float32 dweight,
# twice 154 MB for GPT-2: with 16384 tokens 0.4 ms are saved by 4 chunks in place of 8. Not yet measured.
_CHUNK_BYTES, _MOST_CHUNK_BYTES = 1 << 28, 1 << 30
# Elements of a program of `_scale_kernel`, 16 a thread. Chosen from the compile report, not yet measured.
_BLOCK = 2048


@triton.jit
def _scale_kernel(x_ptr, dloss_ptr, divisor_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """out = x * dloss / divisor in out's dtype; what is None counts as 1, and the mean over nothing as 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
    if dloss_ptr is not None:
        scale = tl.load(dloss_ptr).to(tl.float32)
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
            scale = tl.where(divisor == 0, 0.0, scale / divisor)
        x *= scale
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), at < N)


def rows_at_a_time(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: a power of two up to a quarter of all, whose logits take 256 MiB to 1 GiB; at least 128."""
    row = vocabulary * dtype.itemsize
    most = min(max(_CHUNK_BYTES, tokens * row // 4), _MOST_CHUNK_BYTES) // row
    return max(128, 1 << most.bit_length() >> 1)


def _chunks(hidden, weight, targets, weights, options, chunk, *, loss, dhidden, dweight):
    """Writes the losses (M,), and of dhidden (M, C) and float32 dweight (V, C) what is not None. chunk 0: as fits."""
    M, V = hidden.shape[0], weight.shape[0]
    chunk = chunk or rows_at_a_time(M, V, weight.dtype)
    logits = empty_rows((min(chunk, M), V), hidden.dtype, hidden.device)
    needed = dhidden is not None or dweight is not None
    if dweight is not None and M == 0:
        dweight.zero_()
    for start in range(0, M, chunk):
        part = slice(start, start + chunk)
        x = logits[: M - start]
        product(hidden[part], weight.T, out=x)
        token_weights = None if weights is None else weights[part]
        losses(x, targets[part], token_weights, *options, loss=loss[part], dx=x if needed else None)
        if dhidden is not None:
            product(x, weight, out=dhidden[part])
        if dweight is not None:
            long_product(x.T, hidden[part], out=dweight, accumulate=start > 0)


def _scaled(x, dtype, dloss=None, divisor=None):
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    divisor = divisor if divisor is not None and divisor.numel() else None
    _scale_kernel[(cdiv(x.numel(), _BLOCK),)](x, dloss, divisor, out, x.numel(), BLOCK_N=_BLOCK, num_warps=4)
    return out


def _gradients(hidden, weight, needs_dhidden, needs_dweight):
    """Room for dhidden and for float32 dweight; None for what is not needed."""
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_dhidden else None
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if needs_dweight else None
    return dhidden, dweight


def _or_empty(x, device, dtype=torch.float32):
    return torch.empty(0, dtype=dtype, device=device) if x is None else x


def linear_cross_entropy_forward(
    hidden, weight, targets, weights, ignore_index, label_smoothing, z_loss, reduction, chunk,
    needs_dhidden, needs_dweight,
):  # fmt: skip
    """loss, the mean's divisor, and dhidden and float32 dweight of the losses' sum; empty what is not needed.

    For the reduction "none" the gradients are never made here.
    """
    device, options = hidden.device, (ignore_index, label_smoothing, z_loss)
    loss = torch.empty(targets.numel(), dtype=torch.float32, device=device)
    added = reduction != "none"
    dhidden, dweight = _gradients(hidden, weight, needs_dhidden and added, needs_dweight and added)
    tokens = targets.reshape(-1), None if weights is None else weights.reshape(-1)
    flat = None if dhidden is None else dhidden.view(targets.numel(), hidden.shape[-1])
    _chunks(rows(hidden), weight, *tokens, options, chunk, loss=loss, dhidden=flat, dweight=dweight)
    divisor = divisor_of(targets, weights, ignore_index) if reduction == "mean" else None
    loss = total_of(loss, divisor) if added else loss.view(targets.shape)
    return loss, _or_empty(divisor, device), _or_empty(dhidden, device, hidden.dtype), _or_empty(dweight, device)


def linear_cross_entropy_backward(
    dloss, hidden, weight, targets, weights, divisor, dhidden, dweight, ignore_index, label_smoothing, z_loss,
    reduction, chunk, needs_dhidden, needs_dweight,
):  # fmt: skip
    """dhidden and dweight in their arrays' dtypes, from those of the forward pass; empty what is not needed."""
    if reduction != "none":
        dhidden = _scaled(dhidden, hidden.dtype, dloss, divisor) if needs_dhidden else None
        dweight = _scaled(dweight, weight.dtype, dloss, divisor) if needs_dweight else None
    else:
        tokens = targets.reshape(-1), dloss.reshape(-1) * (1 if weights is None else weights.reshape(-1))
        dhidden, dweight = _gradients(hidden, weight, needs_dhidden, needs_dweight)
        flat = None if dhidden is None else dhidden.view(targets.numel(), hidden.shape[-1])
        loss = torch.empty(targets.numel(), dtype=torch.float32, device=hidden.device)
        options = (ignore_index, label_smoothing, z_loss)
        _chunks(rows(hidden), weight, *tokens, options, chunk, loss=loss, dhidden=flat, dweight=dweight)
        if needs_dweight and weight.dtype != torch.float32:
            dweight = _scaled(dweight, weight.dtype)
    return _or_empty(dhidden, hidden.device, hidden.dtype), _or_empty(dweight, hidden.device, weight.dtype)
