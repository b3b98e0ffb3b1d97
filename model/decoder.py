"""Decoding, one token for every row at a time: what a generation loop needs of a model.

`Decoder` is the seam where a captured CUDA graph or a persistent kernel takes the place of the eager
form: rows are slots of one cache, a step reads lengths and positions from device memory, and nothing
in it waits for a value.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from model import gpt2
from model.cache import Cache
from model.config import GPT2Config
from model.parameters import Parameters


class Decoder(Protocol):
    """Rows 0 to n - 1 hold sequences; logits are (n, V), on the device."""

    lengths: list[int]  # tokens held by each row, as the host knows them

    def prefill(self, row: int, ids: Sequence[int]) -> Any:
        """Starts row `row` with these tokens; returns the logits (1, V) after the last."""

    def extend(self, row: int, ids: Sequence[int]) -> Any:
        """Appends tokens to row `row`; returns the logits (1, V) after the last."""

    def step(self, tokens: Sequence[int]) -> Any:
        """Appends one token to each of the first len(tokens) rows; returns their logits."""

    def move(self, source: int, target: int) -> None:
        """Copies row `source` over row `target`."""


class EagerDecoder:
    """The ops called one by one, on any device."""

    def __init__(self, parameters: Parameters, config: GPT2Config, *, rows: int, capacity: int):
        self._parameters, self._config = parameters, config
        self._device = parameters.device
        self.lengths = [0] * rows
        self.cache = Cache(
            self._device,
            layers=config.n_layer,
            rows=rows,
            capacity=capacity,
            heads=config.n_head,
            width=config.head_width,
            dtype=parameters.activation_dtype,
        )

    def prefill(self, row: int, ids: Sequence[int]) -> Any:
        self.cache.lengths[row] = 0
        self.lengths[row] = 0
        return self.extend(row, ids)

    def extend(self, row: int, ids: Sequence[int]) -> Any:
        self.lengths[row] += len(ids)
        return self._forward(self.cache.rows(row, row + 1), [list(ids)], self.lengths[row])

    def step(self, tokens: Sequence[int]) -> Any:
        rows = len(tokens)
        for row in range(rows):
            self.lengths[row] += 1
        return self._forward(self.cache.rows(0, rows), [[token] for token in tokens], max(self.lengths[:rows]))

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self.lengths[target] = self.lengths[source]

    def _forward(self, cache: Cache, ids: list[list[int]], extent: int) -> Any:
        positions = cache.advance(len(ids[0]), extent)
        ids = self._device.indices(ids)
        # Only the last position is wanted, and only that is unembedded: the table is a third of GPT-2's weights.
        x = gpt2.hidden_states(self._parameters, self._config, ids, positions, cache, last_only=True)
        return gpt2.unembed(self._parameters, self._config, x[:, 0])
