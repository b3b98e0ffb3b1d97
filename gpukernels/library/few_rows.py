"""The product of few rows as a torch op, for inference: it has no gradient."""

from gpukernels import torch_ops
from gpukernels.kernels import few_rows as kernels
from gpukernels.library.registry import define, empty


def _launch(x, weight, bias, norm_weight, norm_bias, eps, center, activation, residual):
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps, center)
    return kernels.few_rows(x, weight, bias, norm=norm, activation=activation, residual=residual)


def _plain(x, weight, bias, norm_weight, norm_bias, eps, center, activation, residual):
    if norm_weight is not None and center:
        x = torch_ops.layer_norm(x, norm_weight, norm_bias, eps=eps)
    elif norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps=eps)
        x = x if norm_bias is None else x + norm_bias.to(x.dtype)
    return torch_ops.linear(x, weight, bias, activation=activation, residual=residual).contiguous()


def _fake(x, weight, bias, norm_weight, norm_bias, eps, center, activation, residual):
    return empty(x, *x.shape[:-1], weight.shape[0])


_few_rows = define(
    "few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, bool center, "
    "str? activation, Tensor? residual) -> Tensor",
    launch=_launch,
    plain=_plain,
    fake=_fake,
)


def few_rows(x, weight, bias=None, *, norm=None, activation=None, residual=None):
    """As `gpukernels.kernels.few_rows.few_rows`; norm: (weight, bias or None, eps, center)."""
    norm_weight, norm_bias, eps, center = norm or (None, None, 0.0, False)
    return _few_rows(x, weight, bias, norm_weight, norm_bias, eps, center, activation, residual)
