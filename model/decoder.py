"""Decoding, one token for every row at a time: what a generation loop needs of a model.

A step is static: lengths, sampling parameters and random counters lie in device memory, the chosen token's
embedding is where the next step begins, and nothing waits for a value. So a captured CUDA graph
(`model.graph`) can take the place of the ops called one by one, and the host may read a token while the
next step runs.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from gpukernels import sample_embed
from model.architecture import architecture
from model.cache import Cache
from model.config import Config
from model.parameters import Parameters
from model.sampling import Sampling, SamplingState

#: Asks for the tokens of a step: waits until the device has them. -1 where the logits were not finite.
Tokens = Callable[[], list[int]]

# Positions of a prompt at a time: what stands between two ops is so many rows, and the cache has the others.
CHUNK = 2048


class Decoder:
    """Rows 0 to n - 1 hold sequences; the ops are called one by one, on any device.

    Attributes:
        lengths: the tokens that each row's cache holds, as the host knows them.
        ahead: whether a step only starts here, and the host can do something else meanwhile.
    """

    def __init__(
        self, parameters: Parameters, config: Config, *, rows: int, capacity: int, vocabulary: int | None = None
    ):
        """vocabulary: ids from here on are never chosen; default all may be."""
        self._parameters, self._config, self._model = parameters, config, architecture(config)
        self._device = parameters.device
        self.ahead = self._device.asynchronous
        self.lengths = [0] * rows
        self.cache = Cache(
            self._device,
            layers=config.n_layer,
            rows=rows,
            capacity=capacity,
            heads=config.n_head,
            kv_heads=config.kv_heads,
            width=config.head_width,
            dtype=parameters.activation_dtype,
        )
        self.sampling = SamplingState(self._device, rows, vocabulary or config.vocab_size)
        # The token that each row feeds next, embedded.
        self._x = self._device.zeros((rows, 1, config.n_embd), parameters.activation_dtype)
        self._prompt_logits: Any = None  # (1, V), of the row that was started last

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def start(
        self,
        row: int,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        seed: int = 0,
        stream: int = 0,
        step: int = 0,
        seen: Collection[int] = (),
        like: int | None = None,
    ) -> Tokens:
        """Starts row `row` with these tokens, and chooses the one behind them.

        Args:
            seed, stream, step: what the first token is drawn from; the next one from step + 1.
            seen: the ids that the repetition penalty falls on.
            like: a row that has been started with the same tokens by the call before this one. They are not computed
                again: what would come out is there, to the bit.
        """
        self.sampling.set(row, sampling, seed=seed, stream=stream, step=step, seen=seen)
        if like is None:
            self._prompt_logits = self.prefill(row, ids)
        else:
            self.cache.copy(like, row, len(ids))
            self._hold(row, len(ids))
        return self._device.fetch(self._choose(self._prompt_logits, row, row + 1, self._names(row, row + 1)))

    def step(self, rows: int) -> Tokens:
        """Feeds each of the first `rows` rows the token chosen last, and chooses the next ones."""
        for row in range(rows):
            self.lengths[row] += 1
        return self._device.fetch(self._step(rows, max(self.lengths[:rows]), self._names(0, rows)))

    def release(self, row: int) -> None:
        """Forgets the row: steps leave it alone until it starts again."""
        self._hold(row, 0)

    def move(self, source: int, target: int) -> None:
        """Copies row `source` over row `target`."""
        self.cache.copy(source, target, self.lengths[source])
        self.cache.lengths[target] = self.cache.lengths[source]
        self.sampling.move(source, target)
        self._x[target] = self._x[source]
        self.lengths[target] = self.lengths[source]

    def prefill(self, row: int, ids: Sequence[int]) -> Any:
        """Fills row `row` with these tokens; returns the logits (1, V) behind the last."""
        self.release(row)
        return self.extend(row, ids)

    def extend(self, row: int, ids: Sequence[int]) -> Any:
        """Appends tokens to what row `row` holds; returns the logits (1, V) behind the last."""
        device, start = self._device, self.lengths[row]
        for first in range(0, len(ids), CHUNK):
            part = ids[first : first + CHUNK]
            self._hold(row, self.lengths[row] + len(part))
            positions = device.indices([range(start + first, self.lengths[row])])
            x = self._read(row, device.indices([part]), positions, self.lengths[row])
        return self._model.unembed(self._parameters, self._config, x)

    def feed(self, tokens: Sequence[int]) -> Any:
        """Appends one given token to each of the first rows; returns their logits (n, V)."""
        rows, device = len(tokens), self._device
        positions = device.indices([[length] for length in self.lengths[:rows]])
        self._x[:rows] = self._model.embed(self._parameters, device.indices([[token] for token in tokens]), positions)
        for row in range(rows):
            self._hold(row, self.lengths[row] + 1)
        return self._logits(rows, max(self.lengths[:rows]))

    def _hold(self, row: int, length: int) -> None:
        self.lengths[row] = length
        self.cache.hold(row, length)

    def _names(self, start: int, stop: int) -> tuple[str, ...]:
        """The arguments of `sample` that are used for rows `start` to `stop`."""
        return self.sampling.needed(start, stop)

    def _read(self, row: int, ids: Any, positions: Any, extent: int) -> Any:
        """(1, C), behind the last of tokens (1, T) that row `row`'s length counts already."""
        x = self._model.embed(self._parameters, ids, positions)
        x = self._model.blocks(self._parameters, self._config, x, self.cache.rows(row, row + 1, extent), last_only=True)
        return x[:, 0]

    def _step(self, rows: int, extent: int, names: Iterable[str]) -> Any:
        return self._choose(self._logits(rows, extent), 0, rows, names)

    def _logits(self, rows: int, extent: int) -> Any:
        """(n, V), behind the tokens that stand embedded in `_x`; the device's lengths count them already."""
        x = self._model.blocks(self._parameters, self._config, self._x[:rows], self.cache.rows(0, rows, extent))
        return self._model.unembed(self._parameters, self._config, x[:, 0])

    def _choose(self, logits: Any, start: int, stop: int, names: Iterable[str]) -> Any:
        """The next tokens of rows `start` to `stop`, which are ready for their step then.

        names: the arguments of `sample` that are used.
        """
        root = self._parameters.root
        return sample_embed(
            logits[:, : self.sampling.vocabulary],
            lengths=self.cache.lengths[start:stop],
            weight=root["tokens.weight"],
            position_weight=root.get("positions.weight"),
            x=self._x[start:stop],
            **self.sampling.arrays(names, start, stop),
        )
