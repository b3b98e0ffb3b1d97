"""Low-rank adapters while they train: torch parameters beside the frozen weights.

A layer's adapter makes the weight that its product uses, W + scale b a, anew in every step. So the forward pass
is `model.gpt2`'s own, through every fused kernel, and what trains is exactly what is merged and served. The
other way, x W^T + scale (x a^T) b^T, would save the product of dW (a third of an adapted layer's work) but needs
products of its own between the norm, the bias and the activation, and a second forward pass. What this way takes:
2 r multiply-adds for each number of W, whatever the number of tokens; and one copy of each adapted weight from
forward to backward, with activation checkpointing of one block at a time.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.adapter import LowRank
from model.errors import TrainingError
from model.finetune.lora import Lora


class Adapter(nn.Module):
    """The adapter of a weight (out, in): a (rank, in), uniform to 1 / sqrt(in) as PEFT draws it, and b = 0."""

    def __init__(self, weight: torch.Tensor, lora: Lora, random: torch.Generator):
        super().__init__()
        out, width = weight.shape
        if lora.rank > min(out, width):
            raise TrainingError(f"the rank of adapters is {lora.rank}, and a weight is only {(out, width)}")
        self.scale = lora.scale
        drawn = torch.rand((lora.rank, width), generator=random).sub_(0.5).mul_(2 / math.sqrt(width))
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(torch.zeros(out, lora.rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that is used; of 16 bits it is summed in float32 and rounded once."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def attach(network: nn.Module, layers: Sequence[str], lora: Lora, seed: int) -> None:
    """Freezes a `Network` and gives layers ("blocks.0.qkv") an adapter each; `seed` decides their first values."""
    network.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for name in layers:
        layer: Any = network.get_submodule(name)
        layer.adapter = Adapter(layer.weight, lora, random)


def adapters(network: nn.Module) -> dict[str, LowRank]:
    """The adapters of a `Network` by the layer's name, as they are now."""
    return {
        name.removesuffix(".adapter"): LowRank(_host(module.a), _host(module.b), module.scale)
        for name, module in network.named_modules()
        if isinstance(module, Adapter)
    }


def _host(tensor: torch.Tensor):
    return tensor.detach().float().cpu().numpy().copy()
