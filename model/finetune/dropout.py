"""Dropout (Srivastava et al., JMLR 2014): where it strikes is in `modules.py`; here is what fixes its draws.

torch draws the masks, from its one random stream of a device. A pass begins at a place of the stream that its step,
its number and its rank fix: so a run that is resumed draws what it would have drawn, and nobody else's stream moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawn(device: torch.device, *place: int) -> Iterator[None]:
    """Inside, torch draws on the CPU and `device` from a stream that the numbers of `place` fix; behind it, as before.

    Args:
        place: whole numbers, 0 or more: the run's seed, the step, the pass, the rank.
    """
    (seed,) = np.random.SeedSequence(place).generate_state(1, np.uint64)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(int(seed))  # `torch.manual_seed` would move those of all GPUs
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield
