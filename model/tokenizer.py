"""Text to token ids and back, over the `tokenizers` library; `tokenizer_files` reads the files."""

import codecs
import json
import operator
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from model.errors import TokenizerError
from model.tokenizer_files import read_backend

_TEXT = "x"  # a token that any decoder takes for text before another
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # what a piece of one byte is called


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        backend: the `tokenizers.Tokenizer` beneath.
        notices: what was remarkable about its files.
    """

    def __init__(self, backend: Backend, notices: Sequence[str] = ()):
        self.backend, self.notices = backend, list(notices)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """From `tokenizer.json`, else `vocab.json` and `merges.txt`; None if the folder has neither.

        Raises TokenizerError for a damaged file.
        """
        found = read_backend(folder)
        return None if found is None else cls(*found)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of `text`, with the special tokens that the tokenizer puts around one (bos, in LLaMA's).

        Args:
            continues: the text goes on where another ended: without special tokens around it, and without the
                space that some tokenizers put before a text.

        Raises TokenizerError for what is no text, and for half a character (a lone surrogate).
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a string, got {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise TokenizerError(f"the text is not valid Unicode: {fault.reason}") from None
        backend = self._continuing if continues else self.backend
        return backend.encode(text, add_special_tokens=not continues).ids

    def encode_all(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """The ids of each text, which must be valid Unicode; as `encode` has them, on several cores."""
        backend = self._continuing if continues else self.backend
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=not continues)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are none become U+FFFD, an id without a token nothing.

        Raises TokenizerError for what is no id.
        """
        try:
            numbers = [operator.index(id) for id in ids]
        except TypeError:
            numbers = [-1]
        if min(numbers, default=0) < 0:
            raise TokenizerError(f"ids must be whole numbers, 0 or more, got {ids!r}")
        stream = TextStream(self)
        return "".join(stream.step(id) for id in numbers if id < 2**32) + stream.flush()

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that are no text."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def to_json(self) -> str:
        return self.backend.to_str(pretty=True)

    @cached_property
    def _continuing(self) -> Backend:
        """The backend, but for the space before a text; the vocabulary is the same in memory."""
        parts = {name: getattr(self.backend, name) for name in ("normalizer", "pre_tokenizer")}
        states = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
        changed = {name: _without_prefix(state) for name, state in states.items()}
        if changed == states:
            return self.backend
        rest = {"version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None}
        read = Backend.from_str(json.dumps(rest | changed | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
        backend = Backend(self.backend.model)
        backend.normalizer, backend.pre_tokenizer = read.normalizer, read.pre_tokenizer
        backend.add_tokens([token for _, token in sorted(self.backend.get_added_tokens_decoder().items())])
        backend.encode_special_tokens = self.backend.encode_special_tokens
        return backend


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, as `tokenizer.json` has it, without the space that it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [kept for each in part[name] if (kept := _without_prefix(each)) is not None]}
    space = {"ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "never"}}
    return part | space.get(part["type"], {})


class TextStream:
    """Text from ids that come one by one: what is passed on never has half a character.

    The pieces of `step` and the rest of `flush` join to `Tokenizer.decode` of all the ids. Where they follow a text,
    they keep the space before their first word, which a SentencePiece decoder takes from the beginning of a text. The
    library's own `DecodeStream` does not, and of bytes in a row its decoders make U+FFFD alone where one is wrong.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        """after: the ids before."""
        self._tokenizer = tokenizer
        decoder = tokenizer.backend.decoder
        self._decode = " ".join if decoder is None else decoder.decode
        # A token's text can depend on the ones before it: on whether there are any, mostly.
        self._context = [_TEXT] if any(id not in tokenizer.special_ids for id in after) else []
        self._held: list[str] = []
        fallback = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if fallback else None

    def step(self, id: int) -> str:
        """The text that `id` completes, often none inside an emoji or a CJK character."""
        token = self._tokenizer.backend.id_to_token(id)
        if token is None or id in self._tokenizer.special_ids:
            return ""
        if self._bytes is not None and _BYTE.fullmatch(token):
            piece = self._bytes.decode(bytes([int(token[3:5], 16)]))
            self._context = [_TEXT] if piece else self._context
            return piece
        rest = self._rest_of_bytes()
        self._held.append(token)
        return rest + self._release(whole=False)

    def flush(self) -> str:
        """What was held back: the replacement characters of bytes that never became text."""
        return self._rest_of_bytes() + self._release(whole=True)

    def _rest_of_bytes(self) -> str:
        piece = "" if self._bytes is None else self._bytes.decode(b"", final=True)
        self._context = [_TEXT] if piece else self._context
        return piece

    def _release(self, *, whole: bool) -> str:
        text = self._decode([*self._context, *self._held])
        if text.endswith("\ufffd") and not whole and self._bytes is None:  # perhaps half a character
            return ""
        known = len(self._decode(self._context))
        self._context, self._held = self._held, []
        return text[known:]
