"""The providers of each op: ours, plain torch, torch.compile of that, and what else is installed for it."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpukernels
from gpukernels import torch_ops

OURS, TORCH, COMPILED = "ours", "torch", "torch.compile"


class Provider(NamedTuple):
    """One way of doing an op: called with the case's inputs by name, it returns a tensor or a tuple of them."""

    name: str
    run: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around its calls
    at_once: Callable[..., Any] | None = None  # results and gradients in one call, for "both"
    capturable: bool = True  # a CUDA graph can hold it
    joint: bool = False  # its forward pass makes the gradients: its backward alone is nothing


class Op(NamedTuple):
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    truth: Callable[..., Any]  # plain torch, of any dtype; the gate calls it in float64
    rivals: Callable[[], list[Provider]] = list
    at_once: Callable[..., Any] | None = None  # ours: results and gradients in one call


def providers(op: str, *, compiled: bool) -> list[Provider]:
    """Ours first; `compiled` adds torch.compile."""
    entry = OPS[op]
    made = [Provider(OURS, entry.ours, at_once=entry.at_once), Provider(TORCH, entry.torch)]
    if compiled:
        made.append(Provider(COMPILED, _compiled(entry.torch)))
    return made + entry.rivals()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._functorch.config as functorch

    torch._dynamo.reset()  # of another case: a function is compiled for eight shapes, and then no more
    functorch.donated_buffer = False  # so that a graph can be kept and its backward pass timed again and again
    warnings.filterwarnings(
        "ignore", message="Dynamo detected a call to a `functools.lru_cache`"
    )  # which keeps the mask
    return torch.compile(function, fullgraph=True, dynamic=False)


# Attention


@functools.cache
def _above_diagonal(new: int, device: torch.device) -> torch.Tensor:
    """Made once, as a model keeps it in a buffer."""
    return torch.ones(new, new, dtype=torch.bool, device=device).triu(1)


def _eager_attention(q, k, v):
    hidden = _above_diagonal(q.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def _eager_decode(q, k, v, lengths):
    """Every row full, as the cases have it: nothing to mask."""
    scores = (q * q.shape[-1] ** -0.5)[:, :, None] @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2))[:, :, 0]


def _sdpa_decode(q, k, v, lengths):
    return F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2))[:, :, 0]


def _backends(function: Callable[..., Any]) -> Callable[[], list[Provider]]:
    backends = {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }

    def made() -> list[Provider]:
        if not torch.cuda.is_available():
            return []
        return [Provider(name, function, functools.partial(sdpa_kernel, one)) for name, one in backends.items()]

    return made


# Liger-Kernel. Its RoPE is left out: it writes over its inputs, and takes tables that ours makes.


def _liger(name: str, call: Callable[..., Any], **options: bool) -> Callable[[], list[Provider]]:
    def made() -> list[Provider]:
        there = find_spec("liger_kernel") is not None and torch.cuda.is_available()
        return [Provider("Liger", run, **options)] if there else []

    def run(**inputs: torch.Tensor) -> Any:
        # Here, so that one that cannot be imported is a row of a table, and no end of it.
        import liger_kernel.transformers.functional as liger

        return call(getattr(liger, name), **inputs)

    return made


_liger_layer_norm = _liger("liger_layer_norm", lambda run, x, weight, bias: run(x, weight, bias, 1e-5))
_liger_rms_norm = _liger("liger_rms_norm", lambda run, x, weight: run(x, weight, 1e-6, in_place=False))
_liger_swiglu = _liger("liger_swiglu", lambda run, gate, up: run(gate, up))
# Their backward pass asks the device whether the upstream gradient is 1, which no graph can hold.
_liger_cross_entropy = _liger(
    "liger_cross_entropy", lambda run, logits, targets: run(logits, targets), capturable=False, joint=True
)
_liger_linear_cross_entropy = _liger(
    "liger_fused_linear_cross_entropy",
    lambda run, hidden, weight, targets: run(hidden, weight, targets),
    capturable=False,
    joint=True,
)


# Plain torch, as one writes it


def _eager_rope(x, positions):
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None, None] * frequencies
    cos, sin = (torch.cat([each, each], -1).to(x.dtype) for each in (angle.cos(), angle.sin()))
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def _linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


_ADAMW = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}


def _torch_adamw(parameter, gradient, first_moment, second_moment, step, learning_rate):
    """What torch.optim.AdamW(fused=True) calls."""
    state = [[each] for each in (parameter, gradient, first_moment, second_moment)]
    torch._fused_adamw_(
        *state, [], [step.to(torch.float32).reshape(())], lr=1e-3, amsgrad=False, maximize=False, **_ADAMW
    )
    return parameter, first_moment, second_moment


def _adamw(run: Callable[..., None]) -> Callable[..., Any]:
    def updated(parameter, gradient, first_moment, second_moment, step, learning_rate):
        options = {"betas": (0.9, 0.999), "weight_decay": _ADAMW["weight_decay"]}
        run(parameter, gradient, first_moment, second_moment, step=step, learning_rate=learning_rate, **options)
        return parameter, first_moment, second_moment

    return updated


OPS = {
    "attention": Op(gpukernels.attention, _eager_attention, torch_ops.attention, _backends(_sdpa)),
    "decode_attention": Op(
        gpukernels.decode_attention, _eager_decode, torch_ops.decode_attention, _backends(_sdpa_decode)
    ),
    "layer_norm": Op(
        gpukernels.layer_norm,
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        torch_ops.layer_norm,
        _liger_layer_norm,
    ),
    "rms_norm": Op(
        gpukernels.rms_norm,
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
        torch_ops.rms_norm,
        _liger_rms_norm,
    ),
    "linear": Op(gpukernels.linear, F.linear, torch_ops.linear),
    "linear_gelu": Op(
        functools.partial(gpukernels.linear, activation="gelu_new"),
        _linear_gelu,
        functools.partial(torch_ops.linear, activation="gelu_new"),
    ),
    "few_rows": Op(gpukernels.linear, F.linear, torch_ops.linear),
    "norm_linear": Op(
        gpukernels.norm_linear,
        lambda x, norm_weight, norm_bias, weight, bias: F.linear(
            F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias
        ),
        torch_ops.norm_linear,
    ),
    "rms_norm_linear": Op(
        functools.partial(gpukernels.norm_linear, norm_bias=None, norm="rms", eps=1e-6),
        lambda x, norm_weight, weight: F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6), weight),
        functools.partial(torch_ops.norm_linear, norm_bias=None, norm="rms", eps=1e-6),
    ),
    "rope": Op(gpukernels.rope, _eager_rope, torch_ops.rope),
    "swiglu": Op(gpukernels.swiglu, lambda gate, up: F.silu(gate) * up, torch_ops.swiglu, _liger_swiglu),
    "gelu": Op(gpukernels.gelu, lambda x: F.gelu(x, approximate="tanh"), torch_ops.gelu),
    "embedding": Op(gpukernels.embedding, lambda ids, weight: F.embedding(ids, weight), torch_ops.embedding),
    "cross_entropy": Op(
        gpukernels.cross_entropy,
        lambda logits, targets: F.cross_entropy(logits, targets),
        torch_ops.cross_entropy,
        _liger_cross_entropy,
        gpukernels.cross_entropy_with_gradient,
    ),
    "linear_cross_entropy": Op(
        gpukernels.linear_cross_entropy,
        lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight), targets),
        torch_ops.linear_cross_entropy,
        _liger_linear_cross_entropy,
    ),
    "adamw": Op(_adamw(gpukernels.adamw), _torch_adamw, _adamw(torch_ops.adamw)),
    "sample": Op(gpukernels.sample, torch_ops.sample, torch_ops.sample),
}
