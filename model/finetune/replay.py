"""Passes of training as CUDA graphs: forward, backward and the copy of the gradient in one launch from the host.

A pass of GPT-2 124M is some 450 launches, which Python makes hardly faster than an H100 works them off. What a graph
reads and writes stays where it was when it was captured: a batch is copied to the graph's own tensors. There is one
graph for each shape of a batch: whole ones and an epoch's last, of documents and without.
"""

from collections.abc import Callable

import torch

from model.graph import Capture


class Replayed:
    """Calls of a function with tensors, captured where their shapes come for the first time, and replayed from then on.

    Args:
        capture: see `model.graph`.
    """

    def __init__(self, capture: Capture):
        self._capture = capture
        self._graphs: dict[tuple, tuple] = {}

    def __call__(
        self, function: Callable[..., torch.Tensor], *given: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """What the function returns, in memory that the next call with the same shapes writes.

        Args:
            function: the same in every call. It changes nothing but what its next call would overwrite, for it runs
                once before it is captured, which compiles its kernels.
            given: its arguments, with values that may change from call to call.
        """
        shapes = tuple(None if each is None else each.shape for each in given)
        if shapes not in self._graphs:
            own = [None if each is None else each.clone() for each in given]
            self._graphs[shapes] = (own, *self._capture(lambda: function(*own)))
        own, replay, result = self._graphs[shapes]
        for kept, each in zip(own, given, strict=True):
            if each is not None:
                kept.copy_(each)
        replay()
        return result
