"""Which windows a step takes, and which of them each process has."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.finetune.distributed import World
from model.finetune.packing import IGNORE, Windows, order

# An epoch asks for its order at every step.
_order = functools.lru_cache(maxsize=2)(order)


@dataclass(frozen=True)
class Batches:
    """The batches of a run: step s of n windows, the same on every rank, in shares of `size` for each pass and rank.

    Every rank holds all windows and knows the whole batch: so it can count the targets without asking.
    """

    windows: Windows
    size: int  # windows of one forward pass of one rank
    accumulate: int
    seed: int
    world: World

    @property
    def whole(self) -> int:
        """The windows of one step."""
        return self.size * self.accumulate * self.world.size

    @property
    def steps(self) -> int:
        """The steps of an epoch; the last may have fewer windows."""
        return -(-len(self.windows.tokens) // self.whole)

    def of_step(self, step: int) -> np.ndarray:
        """The numbers of the windows of a step, counted from 0 over all epochs."""
        epoch, inside = divmod(step, self.steps)
        return _order(len(self.windows.tokens), epoch, self.seed)[inside * self.whole : (inside + 1) * self.whole]

    def targets(self, numbers: np.ndarray) -> int:
        """How many targets count in these windows."""
        return int((self.windows.targets[numbers] != IGNORE).sum())

    def passes(self, numbers: np.ndarray, device: torch.device) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """This rank's part of some windows, pass by pass: tokens, targets, positions and documents, (B, T).

        Every rank has as many passes. Where the windows run out, a rank gets one without a target. Where every window
        is one document, documents is None: attention needs no mask.
        """
        each = self.size * self.world.size
        for start in range(0, len(numbers), each):
            share = numbers[start : start + each][self.world.rank * self.size :][: self.size]
            empty = not len(share)
            parts = [array[numbers[:1] if empty else share] for array in self.windows]
            if empty:
                parts[Windows._fields.index("targets")][:] = IGNORE
            *rest, documents = (_moved(part, device) for part in parts)
            alone = (parts[-1] == parts[-1][:, :1]).all()
            yield *rest, None if alone else documents


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory, while the device is still at the step before.
    return tensor.pin_memory().to(device, non_blocking=True)
