"""The generation loop: prompts in, tokens and text out, on any `Decoder`.

Prompts wait in a queue for a row of the decoder; a row that ends makes room for the next one, and the
rows in use stay together at the front. A row sees nothing of its neighbours: its tokens depend on its
prompt, its seed and its stream.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model.decoder import Decoder
from model.errors import ContextError
from model.sampling import Sampling, choose, uniform
from model.stopping import StopMatcher
from model.tokenizer import TextStream, Tokenizer

OVERFLOWS = ("error", "truncate_left", "slide")


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new text, without special tokens, up to a stop string.
        tokens: the new ids, with the one that ended it (of an eos, or of a stop string's last part).
        finish_reason: "stop" (a stop string), "eos", "length" (max_new_tokens), or "context" (no
            position left); None while a stream still runs.
        stop: the stop string that was met, if one was.
        prompt_tokens: how many ids the prompt had, after truncation.
        seed, stream: what the draws came from; the same seed and row give the same tokens.
        prompt_tokens_per_second, generation_tokens_per_second: of this row; 0 where none were timed.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    stop: str | None
    prompt_tokens: int
    seed: int
    stream: int
    prompt_tokens_per_second: float
    generation_tokens_per_second: float


@dataclass(frozen=True)
class Limits:
    """When a row ends, besides a stop string."""

    positions: int  # of the model
    eos: frozenset[int]
    overflow: str = "error"
    max_new_tokens: int | None = 64

    def fit(self, prompt: list[int]) -> tuple[list[int], int | None, str]:
        """The prompt that is used, how many tokens may follow, and the reason to end there.

        Raises ContextError where `overflow="error"` and they do not fit, naming both and the limit.
        """
        new = self.max_new_tokens
        if self.overflow == "slide":
            if self.positions < 2:
                raise ContextError('overflow="slide" needs a model with 2 positions or more')
            return prompt[-self.positions :], new, "length"
        if self.overflow == "truncate_left":
            if new is not None and new >= self.positions:
                raise ContextError(
                    f"max_new_tokens={new} leaves no room for a prompt in the {self.positions} positions of the model; "
                    'ask for fewer, or use overflow="slide"'
                )
            # Without a number of tokens a prompt that is too long leaves half of the context to them.
            room = self.positions - new if new is not None else self.positions // 2 or 1
            if new is not None or len(prompt) >= self.positions:
                prompt = prompt[-room:]
        wanted = len(prompt) + (1 if new is None else new)
        if wanted > self.positions:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and {wanted - len(prompt)} new ones are to follow, but the model "
                f'has {self.positions} positions; shorten one of them, or use overflow="truncate_left" or "slide"'
            )
        if new is None:
            return prompt, self.positions - len(prompt), "context"
        return prompt, new, "length"


class Row:
    """One prompt on its way: what it has, how it goes on, and when it ends."""

    def __init__(
        self,
        prompt: list[int],
        *,
        limits: Limits,
        sampling: Sampling,
        seed: int,
        stream: int,
        stops: Sequence[str],
        tokenizer: Tokenizer | None,
    ):
        self.prompt, self._limit, self._limit_reason = limits.fit(prompt)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._limits, self._sampling = limits, sampling
        self._seed, self._stream = seed, stream
        self._seen = set(self.prompt)
        self._matcher = StopMatcher(stops)
        self._text = TextStream(tokenizer) if tokenizer is not None else None
        self._pieces: list[str] = []
        self._started = self._prefilled = self._ended = 0.0

    @property
    def positions_needed(self) -> int:
        """How many tokens the row may hold in the cache."""
        return len(self.prompt) + (self._limit or 0)

    def start(self) -> None:
        self._started = time.perf_counter()

    def accept(self, logits: np.ndarray) -> str:
        """Takes the next token from its logits (V,); returns the text that this sets free."""
        step = len(self.tokens)
        draw = uniform(self._seed, self._stream, step) if self._sampling.temperature else 0.0
        token = choose(logits, self._sampling, draw, self._seen)
        self.tokens.append(token)
        self._seen.add(token)
        if token in self._limits.eos:
            self.finish_reason = "eos"
        elif len(self.tokens) == self._limit:
            self.finish_reason = self._limit_reason
        piece = self._release(token)
        self._ended = time.perf_counter()
        if step == 0:
            self._prefilled = self._ended
        return piece

    def window(self) -> list[int]:
        """What a slid context keeps, without the last token, which the next step feeds.

        Learned positions cannot be shifted, so the tokens are computed anew from position 0; half of
        the context makes that one prefilled token for each generated one.
        """
        keep = max(2, self._limits.positions // 2)
        return (self.prompt + self.tokens)[-keep:-1]

    def result(self) -> Generation:
        prefill, decode = self._prefilled - self._started, self._ended - self._prefilled
        return Generation(
            text="".join(self._pieces),
            tokens=list(self.tokens),
            finish_reason=self.finish_reason,
            stop=self._matcher.hit,
            prompt_tokens=len(self.prompt),
            seed=self._seed,
            stream=self._stream,
            prompt_tokens_per_second=len(self.prompt) / prefill if prefill > 0 else 0.0,
            generation_tokens_per_second=(len(self.tokens) - 1) / decode if decode > 0 else 0.0,
        )

    def _release(self, token: int) -> str:
        if self._text is None:
            return ""
        text = "" if self.finish_reason == "eos" else self._text.step(token)
        if self.finish_reason:
            text += self._text.flush()
        piece = self._matcher.push(text)
        if self._matcher.hit is not None:
            self.finish_reason = "stop"
        elif self.finish_reason:
            piece += self._matcher.flush()
        self._pieces.append(piece)
        return piece


def run(
    decoder: Decoder, rows: Sequence[Row], *, slots: int, limits: Limits, to_host: Callable[..., np.ndarray]
) -> Iterator[tuple[Row, str]]:
    """Runs the rows to their ends, `slots` at a time; yields each row with each piece of its text.

    `to_host` brings logits (n, V) to the host, cut to the ids that may be chosen.
    """
    waiting, active = deque(rows), []
    while waiting or active:
        while waiting and len(active) < slots:
            row = waiting.popleft()
            row.start()
            logits = decoder.prefill(len(active), row.prompt)
            yield row, row.accept(to_host(logits)[0])
            if row.finish_reason is None:
                active.append(row)
        if not active:
            continue
        for slot, row in enumerate(active):
            if decoder.lengths[slot] == limits.positions:
                decoder.prefill(slot, row.window())
        logits = to_host(decoder.step([row.tokens[-1] for row in active]))
        for row, row_logits in zip(active, logits, strict=True):
            yield row, row.accept(row_logits)
        for slot in reversed(range(len(active))):
            if active[slot].finish_reason is not None:
                last = len(active) - 1
                if slot != last:
                    decoder.move(last, slot)
                    active[slot] = active[last]
                active.pop()
