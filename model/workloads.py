"""The steps that models make, on tensors without data: what the compile report records, and what tests budget.

`WORKLOADS` has each by name. Called, it goes through the model's own code, whose launches
`gpukernels.compile_report.record` writes down; nothing is computed, and no memory is taken.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from gpukernels import (
    adamw,
    attention,
    cached_attention,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)
from gpukernels.launches import dependent_launches
from model import gpt2
from model.decoder import Decoder
from model.device import TorchDevice
from model.gpt2_config import PRESETS, GPT2Config
from model.parameters import Parameters
from model.persistent import PersistentDecoder, why_not_persistent
from model.sampling import DRAWING, FILTERS

META = TorchDevice("meta")


class Workload(NamedTuple):
    """One step of a model."""

    what: str  # in words
    dtype: str  # of parameters and activations, unless another is asked for
    step: Callable[[str], None]  # makes it in a dtype

    def __call__(self, dtype: str | None = None) -> None:
        self.step(dtype or self.dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(outputs, inputs) -> None:
    """The gradients of `inputs`, from one for each of `outputs`."""
    torch.autograd.grad(outputs, inputs, [torch.empty_like(each) for each in outputs])


# GPT-2


def gpt2_prefill(config: GPT2Config, dtype: str) -> None:
    """A prompt that fills the context, into a cache."""
    _decoder(config, 1, dtype).prefill(0, [0] * config.n_positions)


def gpt2_decode(config: GPT2Config, rows: int, dtype: str, *, names: tuple[str, ...] = (*DRAWING, *FILTERS)) -> None:
    """A step of so many rows as a CUDA graph of it is captured; names: the arguments of `sample` that are used."""
    decoder = _decoder(config, rows, dtype)
    with dependent_launches():
        decoder._step(rows, config.n_positions, names)


def gpt2_persistent(config: GPT2Config, dtype: str, *, names: tuple[str, ...] = (*DRAWING, *FILTERS)) -> None:
    """A step in one launch, where the model has one; of any number of rows, as the code is the same."""
    parameters, positions = Parameters(gpt2.slots(config), META, dtype), config.n_positions
    if why_not_persistent(parameters, config) is not None:
        return
    decoder = PersistentDecoder(parameters, config, rows=1, capacity=positions, capture=lambda function: None)
    decoder._step(1, positions, names)


def gpt2_training(config: GPT2Config, rows: int, dtype: str) -> None:
    """Loss and gradients of so many sequences of full length, and AdamW."""
    parameters = Parameters(gpt2.slots(config), META, dtype)
    leaves = [array.requires_grad_() for array in parameters.values()]
    ids, targets, positions = (meta(rows, config.n_positions, dtype=torch.int64, grad=False) for _ in range(3))
    root = parameters.root
    x = gpt2.hidden_states(parameters, config, ids, positions)
    x = layer_norm(x, root["norm.weight"], root["norm.bias"], eps=config.layer_norm_epsilon)
    loss = linear_cross_entropy(x, root["tokens.weight"], targets)
    torch.autograd.grad(loss, leaves)
    optimizer_step(parameters.count, getattr(torch, dtype))


def _decoder(config: GPT2Config, rows: int, dtype: str) -> Decoder:
    parameters = Parameters(gpt2.slots(config), META, dtype)
    return Decoder(parameters, config, rows=rows, capacity=config.n_positions)


def optimizer_step(size: int, dtype: torch.dtype) -> None:
    """AdamW of so many parameters, half of which decay, with a float32 master copy of 16-bit ones."""
    parameter, gradient = (meta(size, dtype=dtype, grad=False) for _ in range(2))
    first, second, master = (meta(size, dtype=torch.float32, grad=False) for _ in range(3))
    step, rate = meta(1, dtype=torch.int32, grad=False), meta(1, dtype=torch.float32, grad=False)
    options = {"step": step, "learning_rate": rate, "decayed": size // 2, "weight_decay": 0.1}
    master = None if dtype == torch.float32 else master
    adamw(parameter, gradient, first, second, **options, master=master, gradient_scale=rate)


# LLaMA 7B: one of its 32 layers, and the output. Touvron et al., arXiv 2302.13971.

_WIDTH, _HEADS, _HIDDEN, _VOCABULARY, _CONTEXT = 4096, 32, 11008, 32000, 2048


def _llama(dtype: str, *, grad: bool) -> dict[str, torch.Tensor]:
    """The parameters, products that read the same rows in one."""
    shapes = {
        "norm1": (_WIDTH,),
        "qkv": (3 * _WIDTH, _WIDTH),
        "projection": (_WIDTH, _WIDTH),
        "norm2": (_WIDTH,),
        "gate_up": (2 * _HIDDEN, _WIDTH),
        "down": (_WIDTH, _HIDDEN),
        "norm": (_WIDTH,),
        "head": (_VOCABULARY, _WIDTH),
    }
    return {name: meta(*shape, dtype=getattr(torch, dtype), grad=grad) for name, shape in shapes.items()}


def _llama_block(p: dict[str, torch.Tensor], x: torch.Tensor, attend: Callable) -> torch.Tensor:
    """x (B, T, C) -> (B, T, C): RMS norms, rotary positions, SwiGLU."""
    batch, new, _ = x.shape
    positions = meta(batch, new, dtype=torch.int32, grad=False)
    heads = linear(rms_norm(x, p["norm1"]), p["qkv"]).view(batch, new, 3 * _HEADS, _WIDTH // _HEADS)
    q, k, v = heads.chunk(3, 2)
    y = attend(rope(q, positions), rope(k, positions), v)
    x = linear(y.reshape(x.shape), p["projection"], residual=x)
    gate, up = linear(rms_norm(x, p["norm2"]), p["gate_up"]).chunk(2, -1)
    return linear(swiglu(gate, up), p["down"], residual=x)


def llama_inference(rows: int, new: int, dtype: str) -> None:
    """So many new tokens for each row, with a cache of the whole context."""
    p = _llama(dtype, grad=False)
    shape = (rows, _HEADS, _CONTEXT, _WIDTH // _HEADS)
    keys, values = (meta(*shape, dtype=getattr(torch, dtype), grad=False).transpose(1, 2) for _ in range(2))
    lengths, arrivals = (meta(*shape, dtype=torch.int32, grad=False) for shape in ((rows,), (rows, _HEADS)))

    def attend(q, k, v):
        return cached_attention(q, k, v, keys, values, lengths, arrivals=arrivals)

    x = meta(rows, new, _WIDTH, dtype=getattr(torch, dtype), grad=False)
    with dependent_launches() if new == 1 else contextlib.nullcontext():
        x = _llama_block(p, x, attend)[:, -1]
        linear(rms_norm(x, p["norm"]), p["head"])


def llama_training(rows: int, dtype: str) -> None:
    """Loss and gradients of so many sequences of full length, and AdamW."""
    p = _llama(dtype, grad=True)
    x = _llama_block(p, meta(rows, _CONTEXT, _WIDTH, dtype=getattr(torch, dtype)), attention)
    targets = meta(rows, _CONTEXT, dtype=torch.int64, grad=False)
    loss = linear_cross_entropy(rms_norm(x, p["norm"]), p["head"], targets)
    torch.autograd.grad(loss, list(p.values()))
    optimizer_step(sum(each.numel() for each in p.values()), getattr(torch, dtype))


def _token(rows: int) -> str:
    return "one token" if rows == 1 else f"one token for each of {rows} rows"


def _workloads() -> dict[str, Workload]:
    found = {}
    for name, config in PRESETS.items():
        full = f"{config.n_positions} tokens"
        found[f"{name}/prefill"] = Workload(f"a prompt of {full}", "float16", partial(gpt2_prefill, config))
        for rows in (1, 8, 64):
            step = partial(gpt2_decode, config, rows)
            found[f"{name}/decode-{rows}"] = Workload(_token(rows), "float16", step)
        step = partial(gpt2_training, config, 8)
        found[f"{name}/training"] = Workload(f"8 sequences of {full}, and AdamW", "bfloat16", step)
    step = partial(gpt2_persistent, PRESETS["gpt2"])
    found["gpt2/persistent"] = Workload(f"{_token(1)} in one launch", "float16", step)
    name, full = "llama-7b", f"{_CONTEXT} tokens, one layer and the output"
    found[f"{name}/prefill"] = Workload(f"a prompt of {full}", "float16", partial(llama_inference, 1, _CONTEXT))
    for rows in (1, 8, 64):
        step = partial(llama_inference, rows, 1)
        found[f"{name}/decode-{rows}"] = Workload(f"{_token(rows)}; one layer and the output", "float16", step)
    step = partial(llama_training, 2)
    found[f"{name}/training"] = Workload(f"2 sequences of {full}, and AdamW", "bfloat16", step)
    return found


#: By name: a model, and what it does.
WORKLOADS = _workloads()
