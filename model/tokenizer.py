"""Text to token ids and back, over the `tokenizers` library."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model.config import read_json
from model.errors import TokenizerError

_END = "<|endoftext|>"


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
        path = whole if whole.is_file() else vocab
        try:
            if whole.is_file():
                return cls(Backend.from_file(str(whole)))
            if not (vocab.is_file() and merges.is_file()):
                return None
            return cls(_byte_level(vocab, merges))
        except TokenizerError:
            raise
        except Exception as fault:  # the library raises bare Exception for whatever it cannot read
            raise TokenizerError(f"{path}: not a tokenizer that can be read: {_first_line(fault)}") from None

    def encode(self, text: str) -> list[int]:
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


def _byte_level(vocab: Path, merges: Path) -> Backend:
    """GPT-2's own files: byte-level BPE as in Radford et al. (2019)."""
    ids = read_json(vocab, TokenizerError)
    added = vocab.parent / "added_tokens.json"
    extra = read_json(added, TokenizerError) if added.is_file() else {}
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    backend = Backend(models.BPE(ids, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if _END in ids:
        backend.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    for token, wanted in sorted(extra.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != wanted:
            raise TokenizerError(f"{added}: gives {token!r} the id {wanted}, which does not follow the vocabulary")
    return backend


def _first_line(fault: Exception) -> str:
    return (str(fault) or type(fault).__name__).splitlines()[0]
