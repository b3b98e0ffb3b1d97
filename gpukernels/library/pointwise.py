"""`gelu` and `swiglu` as torch ops. The backward ops compute from the inputs; nothing else is saved."""

import torch

from gpukernels import torch_ops
from gpukernels.kernels.pointwise import gelu_backward, gelu_forward, swiglu_backward, swiglu_forward
from gpukernels.library.registry import define, differentiate, empty

# By torch's name of the approximation: the activation of `kernels.activations`.
_ACTIVATIONS = {"tanh": "gelu_new", "none": "gelu"}


def _gelu_plain(x, approximate):
    return torch_ops.gelu(x, approximate=approximate).contiguous()


def _gelu_backward_plain(dy, x, approximate):
    return torch.ops.aten.gelu_backward(dy.contiguous(), x.contiguous(), approximate=approximate)


_gelu = define(
    "gelu(Tensor x, str approximate) -> Tensor",
    launch=lambda x, approximate: gelu_forward(x, _ACTIVATIONS[approximate]),
    plain=_gelu_plain,
    fake=lambda x, approximate: empty(x, *x.shape),
)
_gelu_backward = define(
    "gelu_backward(Tensor dy, Tensor x, str approximate) -> Tensor",
    launch=lambda dy, x, approximate: gelu_backward(dy, x, _ACTIVATIONS[approximate]),
    plain=_gelu_backward_plain,
    fake=lambda dy, x, approximate: empty(x, *x.shape),
)


def _save_gelu(ctx, inputs, output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _differentiate_gelu(ctx, dy):
    return _gelu_backward(dy, *ctx.saved_tensors, ctx.approximate), None


differentiate(_gelu, _save_gelu, _differentiate_gelu)


def _swiglu_backward_launch(dy, gate, up, needs):
    return swiglu_backward(dy, gate, up, needs_dgate=needs[0], needs_dup=needs[1])


def _swiglu_backward_plain(dy, gate, up, needs):
    compute = torch.promote_types(gate.dtype, torch.float32)
    dy, wide = dy.to(compute), gate.to(compute)
    sigmoid = wide.sigmoid()
    dgate = (dy * up * sigmoid * (1 + wide * (1 - sigmoid))).to(gate.dtype).contiguous() if needs[0] else empty(gate, 0)
    dup = (dy * wide * sigmoid).to(up.dtype).contiguous() if needs[1] else empty(up, 0)
    return dgate, dup


def _swiglu_backward_fake(dy, gate, up, needs):
    return tuple(empty(x, *(x.shape if need else (0,))) for x, need in zip((gate, up), needs, strict=True))


_swiglu = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    launch=swiglu_forward,
    plain=lambda gate, up: torch_ops.swiglu(gate, up).contiguous(),
    fake=lambda gate, up: empty(gate, *gate.shape),
)
_swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, bool[2] needs) -> (Tensor, Tensor)",
    launch=_swiglu_backward_launch,
    plain=_swiglu_backward_plain,
    fake=_swiglu_backward_fake,
)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_swiglu(ctx, dy):
    needs = ctx.needs_input_grad
    gradients = _swiglu_backward(dy, *ctx.saved_tensors, needs)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


differentiate(_swiglu, _save_swiglu, _differentiate_swiglu)


def gelu(x, *, approximate="tanh"):
    return _gelu(x, approximate)


def swiglu(gate, up):
    return _swiglu(gate, up)
