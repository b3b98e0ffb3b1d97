"""`embedding` as a torch op; one backward op makes the gradient of either table."""

import torch

from gpukernels import torch_ops
from gpukernels.kernels.embedding import embedding_backward, embedding_forward
from gpukernels.library.registry import define, differentiate, empty


def _plain(ids, weight, positions, position_weight, dtype):
    options = {"positions": positions, "position_weight": position_weight, "dtype": dtype}
    return torch_ops.embedding(ids, weight, **options).contiguous()


def _backward_plain(dy, indices, count, dtype):
    sums = torch.zeros((count, dy.shape[-1]), dtype=torch.float32, device=dy.device)
    return sums.index_add(0, indices.reshape(-1), dy.reshape(-1, dy.shape[-1]).float()).to(dtype)


_embedding = define(
    "embedding(Tensor ids, Tensor weight, Tensor? positions, Tensor? position_weight, ScalarType dtype) -> Tensor",
    launch=embedding_forward,
    plain=_plain,
    fake=lambda ids, weight, positions, position_weight, dtype: empty(weight, *ids.shape, weight.shape[1], dtype=dtype),
)
_embedding_backward = define(
    "embedding_backward(Tensor dy, Tensor indices, SymInt count, ScalarType dtype) -> Tensor",
    launch=embedding_backward,
    plain=_backward_plain,
    fake=lambda dy, indices, count, dtype: empty(dy, count, dy.shape[-1], dtype=dtype),
)


def _save(ctx, inputs, output):
    ids, weight, positions, position_weight, _ = inputs
    ctx.save_for_backward(ids, positions)
    ctx.tables = [None if table is None else (table.shape[0], table.dtype) for table in (weight, position_weight)]


def _differentiate(ctx, dy):
    gradients = [
        _embedding_backward(dy, indices, *table) if needed else None
        for indices, table, needed in zip(ctx.saved_tensors, ctx.tables, ctx.needs_input_grad[1:4:2], strict=True)
    ]
    return None, gradients[0], None, gradients[1], None


differentiate(_embedding, _save, _differentiate)


def embedding(ids, weight, *, positions=None, position_weight=None, dtype=None):
    if dtype == torch.float64:  # of narrower tables: the kernels compute in float32
        return torch_ops.embedding(ids, weight, positions=positions, position_weight=position_weight, dtype=dtype)
    return _embedding(ids, weight, positions, position_weight, dtype or weight.dtype)
