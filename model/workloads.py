"""The steps that models make, on tensors without data: what the compile report records, and what tests budget.

`WORKLOADS` has each by name. Called, it goes through the model's own code, whose launches
`gpukernels.compile_report.record` writes down; nothing is computed, and no memory is taken.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from gpukernels import adamw
from gpukernels.launches import dependent_launches
from model.architecture import architecture
from model.config import Config
from model.decoder import Decoder
from model.device import TorchDevice
from model.finetune.modules import Network
from model.gpt2_config import PRESETS, GPT2Config
from model.llama_config import PRESETS as LLAMAS
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


def prefill(config: Config, dtype: str) -> None:
    """A prompt that fills the context, into a cache."""
    _decoder(config, 1, dtype).prefill(0, [0] * config.n_positions)


def decode(config: Config, rows: int, dtype: str, *, names: tuple[str, ...] = (*DRAWING, *FILTERS)) -> None:
    """A step of so many rows as a CUDA graph of it is captured; names: the arguments of `sample` that are used."""
    decoder = _decoder(config, rows, dtype)
    with dependent_launches():
        decoder._step(rows, config.n_positions, names)


def persistent(config: GPT2Config, dtype: str, *, names: tuple[str, ...] = (*DRAWING, *FILTERS)) -> None:
    """A step in one launch, where the model has one; of any number of rows, as the code is the same."""
    parameters, positions = _parameters(config, dtype), config.n_positions
    if why_not_persistent(parameters, config) is not None:
        return
    decoder = PersistentDecoder(parameters, config, rows=1, capacity=positions, capture=lambda function: None)
    decoder._step(1, positions, names)


def training(config: Config, rows: int, dtype: str) -> None:
    """Loss and gradients of so many sequences of full length, and AdamW."""
    network = Network(_parameters(config, dtype), config)
    ids, targets, positions = (meta(rows, config.n_positions, dtype=torch.int64, grad=False) for _ in range(3))
    torch.autograd.grad(network(ids, targets, positions), list(network.parameters()))
    optimizer_step(sum(each.numel() for each in network.parameters()), getattr(torch, dtype))


def _parameters(config: Config, dtype: str) -> Parameters:
    return Parameters(architecture(config).slots(config), META, dtype)


def _decoder(config: Config, rows: int, dtype: str) -> Decoder:
    return Decoder(_parameters(config, dtype), config, rows=rows, capacity=config.n_positions)


def optimizer_step(size: int, dtype: torch.dtype) -> None:
    """AdamW of so many parameters, half of which decay, with a float32 master copy of 16-bit ones."""
    parameter, gradient = (meta(size, dtype=dtype, grad=False) for _ in range(2))
    first, second, master = (meta(size, dtype=torch.float32, grad=False) for _ in range(3))
    step, rate = meta(1, dtype=torch.int32, grad=False), meta(1, dtype=torch.float32, grad=False)
    options = {"step": step, "learning_rate": rate, "decayed": size // 2, "weight_decay": 0.1}
    master = None if dtype == torch.float32 else master
    adamw(parameter, gradient, first, second, **options, master=master, gradient_scale=rate)


def _token(rows: int) -> str:
    return "one token" if rows == 1 else f"one token for each of {rows} rows"


def _workloads() -> dict[str, Workload]:
    found = {}
    for name, config in PRESETS.items():
        full = f"{config.n_positions} tokens"
        found[f"{name}/prefill"] = Workload(f"a prompt of {full}", "float16", partial(prefill, config))
        for rows in (1, 8, 64):
            step = partial(decode, config, rows)
            found[f"{name}/decode-{rows}"] = Workload(_token(rows), "float16", step)
        step = partial(training, config, 8)
        found[f"{name}/training"] = Workload(f"8 sequences of {full}, and AdamW", "bfloat16", step)
    step = partial(persistent, PRESETS["gpt2"])
    found["gpt2/persistent"] = Workload(f"{_token(1)} in one launch", "float16", step)
    # One of its 32 layers: the others are the same.
    config = replace(LLAMAS["llama-2-7b"], num_hidden_layers=1, max_position_embeddings=2048)
    name, full = "llama-7b", f"{config.n_positions} tokens, one layer and the output"
    found[f"{name}/prefill"] = Workload(f"a prompt of {full}", "float16", partial(prefill, config))
    for rows in (1, 8, 64):
        step = partial(decode, config, rows)
        found[f"{name}/decode-{rows}"] = Workload(f"{_token(rows)}; one layer and the output", "float16", step)
    step = partial(training, config, 2)
    found[f"{name}/training"] = Workload(f"2 sequences of {full}, and AdamW", "bfloat16", step)
    return found


#: By name: a model, and what it does.
WORKLOADS = _workloads()
