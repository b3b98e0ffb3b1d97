"""The generation loop: prompts in, tokens and text out, on any `Decoder`.

Prompts wait in a queue for a row of the decoder; a row that ends makes room for the next one, and the
rows in use stay together at the front. A row sees nothing of its neighbours: its tokens depend on its
prompt, its seed and its stream.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.decoder import Decoder, Tokens
from model.errors import ContextError, ModelError
from model.sampling import Sampling
from model.stopping import StopMatcher
from model.tokenizer import TextStream, Tokenizer

OVERFLOWS = ("error", "truncate_left", "slide")


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    Attributes:
        text: the new text, without special tokens, up to a stop string.
        tokens: the new ids, with the one that ended it (of an eos, or of a stop string's last part).
        finish_reason: "stop" (a stop string), "eos", "length" (max_new_tokens), "context" (no position
            left), or "cancelled"; None while a stream still runs.
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
        self._matcher = StopMatcher(stops)
        self._text = TextStream(tokenizer, self.prompt) if tokenizer is not None else None
        self._pieces: list[str] = []
        self._started = self._prefilled = self._ended = 0.0

    @property
    def positions_needed(self) -> int:
        """How many tokens the row may hold in the cache."""
        return len(self.prompt) + (self._limit or 0)

    def start(self, decoder: Decoder, slot: int, *, like: int | None = None) -> Tokens:
        """Computes what the row holds, in a slot of the decoder; its next token. like: see `Decoder.start`."""
        step = len(self.tokens)
        if step == 0:
            self._started = time.perf_counter()
        return decoder.start(
            slot,
            self._window() if step else self.prompt,
            self._sampling,
            seed=self._seed,
            stream=self._stream,
            step=step,
            seen=[*self.prompt, *self.tokens],
            like=like,
        )

    def ends_with(self, more: int) -> bool:
        """Whether the row is known to end with `more` tokens, if not before."""
        return len(self.tokens) + more == self._limit

    def accept(self, token: int) -> str:
        """Takes the next token; returns the text that this sets free."""
        if token < 0:
            raise ModelError("the model's logits are not finite: its weights or activations overflowed")
        step = len(self.tokens)
        self.tokens.append(token)
        if token in self._limits.eos:
            self.finish_reason = "eos"
        elif len(self.tokens) == self._limit:
            self.finish_reason = self._limit_reason
        piece = self._release(token)
        self._ended = time.perf_counter()
        if step == 0:
            self._prefilled = self._ended
        return piece

    def _window(self) -> list[int]:
        """What a slid context keeps.

        Positions are in what the cache holds, learned or turned, so the tokens are computed anew from position 0;
        half of the context makes that one prefilled token for each generated one.
        """
        keep = max(2, self._limits.positions // 2)
        return (self.prompt + self.tokens)[-keep:]

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


def run(decoder: Decoder, rows: Sequence[Row], *, slots: int, limits: Limits) -> Iterator[tuple[Row, str]]:
    """Runs the rows to their ends, `slots` at a time; yields each row with each piece of its text.

    `rows` may be a deque: it is emptied, and rows that are put into it meanwhile are run as well. A row whose
    `finish_reason` is set from outside leaves. Where the decoder runs ahead, a step is started before the tokens
    of the one before it are read: then a row that turns out to have ended has been fed once more, which is not
    looked at.
    """
    waiting, active = rows if isinstance(rows, deque) else deque(rows), []
    running: list[tuple[list[Row], Tokens]] = []  # steps whose tokens have not been read, and for which rows
    while waiting or active:
        joining = []
        while waiting and len(active) < slots:
            row = waiting.popleft()
            if row.finish_reason is None:
                slot = len(active)
                again = bool(joining) and joining[-1][0].prompt == row.prompt
                joining.append((row, row.start(decoder, slot, like=slot - 1 if again else None)))
                active.append(row)
        for row, tokens in joining:  # read when all are on their way
            if row.finish_reason is None:
                yield row, row.accept(*tokens())
        # A row that has ended by now leaves before the next step, and makes room.
        ready = all(row.finish_reason is None for row in active)
        full = [slot for slot in range(len(active)) if decoder.lengths[slot] == limits.positions]
        if full and not running and ready:
            for slot in full:
                (token,) = active[slot].start(decoder, slot)()
                yield active[slot], active[slot].accept(token)
        elif ready and not full and not all(row.ends_with(len(running)) for row in active):
            running.append((list(active), decoder.step(len(active))))
        if running and (full or len(running) > decoder.ahead or all(row.ends_with(len(running)) for row in active)):
            fed, tokens = running.pop(0)
            for row, token in zip(fed, tokens(), strict=True):
                if row.finish_reason is None:
                    yield row, row.accept(token)
        for slot in reversed(range(len(active))):
            if active[slot].finish_reason is not None:
                last = len(active) - 1
                if slot != last:
                    decoder.move(last, slot)
                    active[slot] = active[last]
                decoder.release(last)
                active.pop()
