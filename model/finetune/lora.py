"""What low-rank adapters a run trains: their rank, their scale, and the layers that have them."""

from collections.abc import Iterable
from dataclasses import dataclass

from gpukernels.numbers import finite, whole
from model.adapter import scale_of
from model.errors import TrainingError
from model.finetune.trainable import matching


@dataclass(frozen=True)
class Lora:
    """Which layers have adapters, and what kind.

    Args:
        rank: of each.
        alpha: scale is alpha / rank.
        targets: patterns of layers, "blocks.0.qkv" or only "qkv", "projection", "up", "down". Where queries, keys and
            values have a layer each, as in a LLaMA, "qkv" is all three.
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
        if not finite(self.alpha) or self.alpha <= 0:
            raise TrainingError(f"alpha of adapters must be a number above 0, got {self.alpha!r}")
        if isinstance(self.targets, str) or not self.targets:
            raise TrainingError(f"targets of adapters must be a list of patterns, got {self.targets!r}")

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.rank_stabilized)

    def layers(self, names: Iterable[str]) -> list[str]:
        """Those of the layers `names` that have adapters, in order; TrainingError for a pattern of none."""
        names, targets = list(names), list(self.targets)
        if "qkv" in targets and not any(name.endswith(".qkv") for name in names):
            targets[targets.index("qkv") : targets.index("qkv") + 1] = ["q", "k", "v"]
        patterns = [each if "." in each else f"blocks.*.{each}" for each in targets]
        found = set().union(*(matching(names, pattern) for pattern in patterns))
        return [name for name in names if name in found]
