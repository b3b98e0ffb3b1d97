"""Low-rank adapters while they train: torch parameters beside the frozen weights.

A layer's adapter makes the weight that its product uses, W + scale b a, anew in every step. So the forward pass
is `model.gpt2`'s own, through every fused kernel, and what trains is exactly what is merged and served. The
other way, x W^T + scale (x a^T) b^T, would save the product of dW (a third of an adapted layer's work) but needs
products of its own between the norm, the bias and the activation, and a second forward pass. What this way takes:
2 r multiply-adds for each number of W, whatever the number of tokens; and one copy of each adapted weight from
forward to backward, with activation checkpointing of one block at a time.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.adapter import LowRank, scale_of
from model.errors import TrainingError
from model.finetune.trainable import matching
from model.sampling import whole


@dataclass(frozen=True)
class Lora:
    """Which layers have adapters, and what kind.

    Args:
        rank: of each.
        alpha: scale is alpha / rank.
        targets: patterns of layers, "blocks.0.qkv" or only "qkv", "projection", "up", "down".
        rank_stabilized: scale is alpha / sqrt(rank), arXiv 2312.03732.

    Raises TrainingError for a value that makes no sense.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv",)
    rank_stabilized: bool = False

    def __post_init__(self):
        if not whole(self.rank) or self.rank < 1:
            raise TrainingError(f"the rank of adapters must be a whole number, 1 or more, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise TrainingError(f"alpha of adapters must be a number above 0, got {self.alpha!r}")
        if isinstance(self.targets, str) or not self.targets:
            raise TrainingError(f"targets of adapters must be a list of patterns, got {self.targets!r}")

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.rank_stabilized)

    def layers(self, names: Iterable[str]) -> list[str]:
        """Those of the layers `names` that have adapters, in order; TrainingError for a pattern of none."""
        names = list(names)
        patterns = [each if "." in each else f"blocks.*.{each}" for each in self.targets]
        found = set().union(*(matching(names, pattern) for pattern in patterns))
        return [name for name in names if name in found]


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
