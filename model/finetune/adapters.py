"""Low-rank adapters while they train: torch parameters beside the frozen weights.

A layer's adapter makes the weight that its product uses, W + scale b a, anew in every step. So the forward pass
is the architecture's own, through every fused kernel, and what trains is exactly what is merged and served. The
other way, x W^T + scale (x a^T) b^T, would save the product of dW (a third of an adapted layer's work) but needs
products of its own between the norm, the bias and the activation, and a second forward pass. What this way takes:
2 r multiply-adds for each number of W, whatever the number of tokens; and one copy of each adapted weight from
forward to backward, with activation checkpointing of one block at a time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from model.adapter import LowRank
from model.errors import TrainingError
from model.finetune.distributed import whole
from model.finetune.lora import Lora


class Adapter(nn.Module):
    """The adapter of a weight (out, in): a (rank, in) and b (out, rank)."""

    def __init__(self, weight: torch.Tensor, lora: Lora):
        super().__init__()
        out, width = weight.shape
        if lora.rank > min(out, width):
            raise TrainingError(f"the rank of adapters is {lora.rank}, and a weight is only {(out, width)}")
        self.scale = lora.scale
        self.a = nn.Parameter(torch.empty(lora.rank, width, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.empty(out, lora.rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that is used; of 16 bits it is summed in float32 and rounded once."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The same of whole tensors, where these are in shards."""
        return torch.addmm(weight, whole(self.b), whole(self.a), alpha=self.scale)


def attach(network: nn.Module, layers: Sequence[str], lora: Lora) -> None:
    """Freezes a `Network` and gives layers ("blocks.0.qkv") an adapter each, without values yet."""
    network.requires_grad_(False)
    for name in layers:
        layer: Any = network.get_submodule(name)
        layer.adapter = Adapter(layer.weight, lora)


def first_values(network: nn.Module, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of an adapter and what it starts from: a uniform to 1 / sqrt(in) as PEFT draws it, and b = 0."""
    random = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(module, Adapter):
            rank, width = module.a.shape
            yield f"{name}.a", torch.rand((rank, width), generator=random).sub_(0.5).mul_(2 / math.sqrt(width))
            yield f"{name}.b", torch.zeros(module.b.shape)


def adapters(network: nn.Module) -> dict[str, LowRank]:
    """The adapters of a `Network` by the layer's name, as they are now; every rank must ask."""
    return {
        name.removesuffix(".adapter"): LowRank(_host(module.a), _host(module.b), module.scale)
        for name, module in network.named_modules()
        if isinstance(module, Adapter)
    }


def _host(tensor: torch.Tensor):
    return whole(tensor.detach()).float().cpu().numpy().copy()
