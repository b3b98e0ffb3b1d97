"""Text to token ids and back, over the `tokenizers` library."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model.errors import TokenizerError
from model.files import AGAIN, disguise, read_json

_END = "<|endoftext|>"

# Files beside vocab.json: settings of transformers' tokenizer, its special tokens, and ids behind the vocabulary's.
_SETTINGS, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


class Tokenizer:
    """A model's tokenizer; `backend` is the `tokenizers.Tokenizer` beneath."""

    def __init__(self, backend: Backend):
        self.backend = backend

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """From `tokenizer.json`, else `vocab.json` and `merges.txt`; None if the folder has neither.

        Raises TokenizerError for a damaged file.
        """
        whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        # What has a name is meant to be there: a dead link is damage, not a model without tokenizer.
        if os.path.lexists(whole):
            backend = _parsed(whole, Backend.from_buffer)
        elif os.path.lexists(vocab) or os.path.lexists(merges):
            backend = _byte_level(vocab, merges)
        else:
            return None
        # Both are for batches of training: a prompt is neither cut nor filled up.
        backend.no_padding()
        backend.no_truncation()
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; TokenizerError for half a character (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise TokenizerError(f"the text is not valid Unicode: {fault.reason}") from None
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def to_json(self) -> str:
        return self.backend.to_str(pretty=True)


class TextStream:
    """Text from ids that come one by one: what is passed on never has half a character.

    The pieces of `step` and the rest of `flush` join to `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def step(self, token: int) -> str:
        """The text that `token` completes, often none inside an emoji or a CJK character."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend, token) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What was held back: the replacement characters of bytes that never became text."""
        rest = self._tokenizer.decode(self._ids)[self._length :]
        self._length += len(rest)
        return rest


def _parsed(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a file; TokenizerError, naming it, for whatever goes wrong."""
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise TokenizerError(f"{path}: cannot be read: {fault.strerror}") from None
    try:
        return parse(raw)
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # the library raises bare Exception, and where it panics, less than that
        first = (str(fault) or type(fault).__name__).splitlines()[0]
        what = disguise(raw) or f"not a tokenizer that can be read: {first}; {AGAIN}"
        raise TokenizerError(f"{path}: {what}") from None


def _byte_level(vocab: Path, merges: Path) -> Backend:
    """GPT-2's own files: byte-level BPE as in Radford et al. (2019)."""
    ids = read_json(vocab, TokenizerError)
    if not all(type(each) is int and each >= 0 for each in ids.values()):
        raise TokenizerError(f"{vocab}: must map every token to its id")
    settings, names, extra = (_beside(vocab, name) for name in (_SETTINGS, _SPECIAL, _ADDED))
    backend = _parsed(merges, lambda raw: Backend(models.BPE(ids, _pairs(merges, raw))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    special = {_END, *_special(settings), *_special(names)}
    for token in sorted(special & ids.keys()):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for token, wanted in sorted(extra.items(), key=lambda item: str(item[1]).zfill(9)):
        (backend.add_special_tokens if token in special else backend.add_tokens)([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != wanted:
            path = vocab.with_name(_ADDED)
            raise TokenizerError(f"{path}: gives {token!r} the id {wanted!r}, which does not follow the vocabulary")
    return backend


def _beside(vocab: Path, name: str) -> dict[str, Any]:
    """What a file beside `vocab.json` says, if it is there."""
    path = vocab.with_name(name)
    return read_json(path, TokenizerError) if os.path.lexists(path) else {}


def _special(values: dict[str, Any]) -> Iterator[str]:
    """The tokens that are no text, in either file that names them: "eos_token": TEXT, or {"content": TEXT}."""
    found = [value for name, value in values.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        found += value if isinstance(value := values.get(name), list) else []
    for value in found:
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            yield token


def _pairs(path: Path, raw: bytes) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise TokenizerError(f"{path}: line {number} must be two symbols with a space between, got {line!r}")
            pairs.append(pair)
    return pairs
