"""Text as it comes: of one prompt, or of several that join and leave while others run (continuous batching)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from model.decoder import Decoder
from model.errors import ModelError
from model.generate import Generation, Limits, Row, run


class Stream:
    """Pieces of text as they come; `result` after the last."""

    def __init__(self, row: Row, events: Iterator[tuple[Row, str]]):
        self.row, self._events = row, events

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _, piece in self._events:
            if piece:
                return piece
        raise StopIteration

    @property
    def result(self) -> Generation:
        """The whole; what there is so far, before the end."""
        return self.row.result()


class Entry:
    """One prompt in a `Batch`."""

    def __init__(self, row: Row):
        self._row = row

    @property
    def done(self) -> bool:
        """Whether nothing follows any more."""
        return self._row.finish_reason is not None

    @property
    def result(self) -> Generation:
        """The whole; what there is so far, before the end."""
        return self._row.result()

    def cancel(self) -> None:
        """Ends it here ("cancelled"), without a further event, and makes room. One that is done stays as it is."""
        if not self.done:
            self._row.finish_reason = "cancelled"


class Batch:
    """Prompts in rows of one decoder. Made by `LanguageModel.batch`, whose example shows the use.

    Iterating runs what was added and yields (entry, piece of text), in the order in which they come: each piece that
    is not empty, and one event, perhaps with the empty piece, when an entry is done. It stops when all are; what is
    added later is run by iterating again. A prompt waits until a row is free, and its tokens are those that it would
    have alone. One thread at a time.
    """

    def __init__(
        self,
        read: Callable[..., Row],
        decoder: Decoder,
        limits: Limits,
        give_back: Callable[[Decoder], None],
        slots: int,
        room: Callable[[], AbstractContextManager[None]],
    ):
        """room: explains memory that runs out."""
        self._read, self._decoder, self._limits, self._give_back = read, decoder, limits, give_back
        self._room = room
        self._waiting: deque[Row] = deque()
        self._entries: dict[Row, Entry] = {}
        self._events: Iterator[tuple[Row, str]] | None = None
        self._slots = slots
        self._closed = False

    def add(self, prompt: Any, **options: Any) -> Entry:
        """One more prompt; the options are those of `LanguageModel.stream`.

        Raises:
            ModelError: what `stream` raises, before anything runs; a batch that is closed.
        """
        self._require_open()
        row = self._read(prompt, **options)
        self._waiting.append(row)
        self._entries[row] = entry = Entry(row)
        return entry

    def __iter__(self) -> Iterator[tuple[Entry, str]]:
        return self

    def __next__(self) -> tuple[Entry, str]:
        self._require_open()
        if self._events is None:
            self._events = run(self._decoder, self._waiting, slots=self._slots, limits=self._limits)
        try:
            with self._room():
                for row, piece in self._events:
                    entry = self._entries[row]
                    if entry.done:
                        del self._entries[row]
                    if piece or entry.done:
                        return entry, piece
        except BaseException:
            self.close()  # rows of the decoder are in use, and nobody goes on with them
            raise
        self._events = None
        self._entries.clear()  # all done, or cancelled
        raise StopIteration

    def close(self) -> None:
        """Leaves what still runs as it is, and gives the memory back to the model."""
        if not self._closed:
            self._closed = True
            self._give_back(self._decoder)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ModelError("the batch is closed")
