"""What a model is trained on: documents from a file or from memory, as token ids.

| source | documents |
|---|---|
| a `.txt` file | the whole file is one; with a `separator`, what stands between its occurrences |
| a `.jsonl` file | one a line: `text`; `prompt` and `completion`; or `messages` |
| a list of strings | one each |
| token ids, `.npy`, an array or a tensor | (N, T): one a row; (N,): a stream, in which a document ends with its eos |

A document of text begins as a prompt does, with the special tokens that the tokenizer puts there (bos, in LLaMA's),
and ends with the eos token; token ids are taken as they stand. Where a text itself spells a special token
(`<|endoftext|>`), it is that token. `jsonl.py` says what becomes of prompts and messages.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.errors import DataError
from model.files import LFS, disguise
from model.finetune.jsonl import Part, parse_lines, raise_faults
from model.finetune.packing import permutation
from model.tokenizer import Tokenizer

_EOS = "<|endoftext|>"
_AT_A_TIME = 2**20  # characters encoded together: the tokenizer's own records take a hundred bytes a token


class Document(NamedTuple):
    """One text: nothing in it sees another."""

    ids: np.ndarray  # (n,) int32
    wanted: np.ndarray  # (n,) bool: whether token i counts where it is a target; the first never is one


def read_documents(
    source: Any,
    tokenizer: Tokenizer | None,
    *,
    mask_prompt: bool = False,
    separator: str | None = None,
    eos: int | None = None,
    vocabulary: int | None = None,
) -> list[Document]:
    """The documents of a source.

    Args:
        source: see the table above; a string or a Path is that of a file.
        tokenizer: of the model; None is enough for token ids.
        mask_prompt: only completions and what the assistant says count as targets, each with its eos.
            Plain text and token ids, which have no prompt, are refused then.
        separator: what stands between the documents of a `.txt` file, for example "\\n\\n". It is in none.
        eos: the id that ends a document; None: the tokenizer's `<|endoftext|>`.
        vocabulary: how many tokens the model has; None: as many as the tokenizer.

    Raises:
        DataError: what is wrong, with its line; up to eight faults of a file at once.

    Cost: encoding takes about half a second a megabyte; all ids are in memory, 5 bytes a token.
    """
    if tokenizer is not None:
        eos = tokenizer.backend.token_to_id(_EOS) if eos is None else eos
        vocabulary = tokenizer.size if vocabulary is None else vocabulary
    path = Path(source) if isinstance(source, str | Path) else None
    kind = "" if path is None else path.suffix.lower()
    name = "the data" if path is None else str(path)
    if separator is not None and (kind != ".txt" or not separator or not isinstance(separator, str)):
        raise DataError(f"separator must be text that stands between documents of a .txt file, got {separator!r}")
    if mask_prompt and kind != ".jsonl":
        raise DataError(f"{name}: has no prompts to mask; those of a .jsonl file can be")

    if kind == ".npy" or (path is None and hasattr(source, "__array__")):
        ids = _on_host(source) if path is None else _read_array(path)
        return _of_array(ids, name, eos, vocabulary)
    if tokenizer is None:
        raise DataError(f"{name}: is text, and the model has no tokenizer; give token ids (.npy or an array)")
    if eos is None:
        raise DataError(
            f"{name}: nothing ends a document: the model has no eos_token_id, and its tokenizer no {_EOS}; "
            "name the id in its config.json"
        )
    if kind == ".jsonl":
        texts = parse_lines(name, _read_text(path), mask_prompt)
    elif kind == ".txt":
        text = _read_text(path)
        if separator is not None and separator not in text:
            raise DataError(f"{name}: the separator {separator!r} does not occur in it")
        pieces = [text] if separator is None else text.split(separator)
        texts = [(name, [Part(each, True, True)]) for each in pieces if each.strip()]
    elif path is not None:
        raise DataError(f"{name}: must be .txt, .jsonl or .npy")
    else:
        texts = list(_of_strings(source))
    if not texts:
        raise DataError(f"{name}: there is no text in it")
    return _encode(texts, name, tokenizer, eos, vocabulary)


def split_documents(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, in their order; the seed alone decides which are which.

    Args:
        share: of the documents that validate, from 0 to below 1; above 0 it is one at least, and one at
            least trains. A single document is cut, and its end validates: two tokens at least on each side.

    Raises DataError for a share outside, or one that leaves a side without a target.
    """
    if not 0 <= share < 1:
        raise DataError(f"the share of validation must be from 0 to below 1, got {share}")
    documents = list(documents)
    if share == 0 or not documents:
        return documents, []
    if len(documents) == 1:
        ids, wanted = documents[0]
        cut = max(2, len(ids) - max(2, round(share * len(ids))))
        if len(ids) < cut + 2:
            raise DataError(f"one document of {len(ids)} tokens is too short to keep a part of it for validation")
        return [Document(ids[:cut], wanted[:cut])], [Document(ids[cut:], wanted[cut:])]
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    chosen = np.zeros(len(documents), bool)
    chosen[permutation(len(documents), seed, "split")[:count]] = True
    sides = [], []
    for document, validates in zip(documents, chosen.tolist(), strict=True):
        sides[validates].append(document)
    return sides


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as fault:  # a name with a NUL is the second
        raise DataError(f"{path}: cannot be read: {getattr(fault, 'strerror', fault)}") from None
    if not raw:
        raise DataError(f"{path}: the file is empty")
    if raw.startswith(LFS):  # which is text, too
        raise DataError(f"{path}: {disguise(raw)}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        what = disguise(raw) or f"line {line} is not UTF-8 text: byte 0x{raw[fault.start]:02x} at {fault.start}"
        raise DataError(f"{path}: {what}") from None


def _read_array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start and start not in (b"\x93N", b"PK"):
            # NumPy takes it for a pickle then, and says how to run that.
            raise ValueError("it does not begin like one")
        found = np.load(path, allow_pickle=False)
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    except Exception as fault:  # a damaged head is met as almost anything
        raise DataError(f"{path}: not an array of token ids (.npy): {fault or type(fault).__name__}") from None
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path}: holds several arrays; one is wanted (.npy)")
    return found


def _on_host(source: Any) -> np.ndarray:
    """What NumPy takes for an array, or a tensor of any device and dtype; DataError for one that has no such form."""
    try:
        if hasattr(source, "is_floating_point"):
            source = (source.double() if source.is_floating_point() else source).detach().cpu()
        return np.asarray(source)
    except (TypeError, RuntimeError) as fault:  # of a sparse one, or one without numbers
        raise DataError(f"the data: cannot be read as an array: {str(fault).splitlines()[0]}") from None


def _of_array(ids: np.ndarray, name: str, eos: int | None, vocabulary: int | None) -> list[Document]:
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise DataError(f"{name}: token ids must be whole numbers, (N,) or (N, T); got {ids.dtype} {ids.shape}")
    if not ids.size:
        raise DataError(f"{name}: there is no token in it: its shape is {ids.shape}")
    if vocabulary is None:
        raise DataError(f"{name}: token ids without a tokenizer need the size of the vocabulary (vocabulary)")
    _check_ids(ids.reshape(-1), name, vocabulary)
    ids = ids.astype(np.int32)
    if ids.ndim == 2:
        return [Document(row, np.ones(len(row), bool)) for row in ids]
    ends = np.flatnonzero(ids[:-1] == (-1 if eos is None else eos)) + 1
    return [Document(part, np.ones(len(part), bool)) for part in np.split(ids, ends)]


def _check_ids(ids: np.ndarray, name: str, vocabulary: int) -> None:
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        at = int(outside.argmax())
        raise DataError(f"{name}: token {at} has the id {ids[at]}, outside the vocabulary of {vocabulary}")


def _of_strings(source: Any) -> Iterator[tuple[str, list[Part]]]:
    if not isinstance(source, list | tuple):
        raise DataError(f"the data must be a file, a list of strings, or an array, got {type(source).__name__}")
    for number, text in enumerate(source):
        if not isinstance(text, str):
            raise DataError(f"document {number}: must be a string, got {type(text).__name__}")
        yield f"document {number}", [Part(text, True, True)]


def _encode(texts: list, name: str, tokenizer: Tokenizer, eos: int, vocabulary: int) -> list[Document]:
    """Documents of (where, parts): encoded many parts at a time, then joined."""
    firsts = _batches([parts[0].text for _, parts in texts], tokenizer, continues=False)
    others = _batches([part.text for _, parts in texts for part in parts[1:]], tokenizer, continues=True)
    found, faults, end = [], [], np.array([eos], np.int32)
    around = tokenizer.encode("")  # what the tokenizer puts around a text
    has_end = tokenizer.encode("a")[-1:] == [eos]
    for where, parts in texts:
        pieces, flags = [], []
        for number, part in enumerate(parts):
            ids = next(others if number else firsts)
            if ids is None:
                faults.append(f"{where}: is not valid Unicode: half of a surrogate pair")
                ids = end
            elif len(ids) == len(around) and len(parts) == 1:
                faults.append(f"{where}: there is no token in it")
            for piece in (ids, end) if part.ends and not (has_end and number == 0) else (ids,):
                pieces.append(piece)
                flags.append(np.full(len(piece), part.wanted))
        found.append(Document(np.concatenate(pieces), np.concatenate(flags)))
    raise_faults(faults, name)
    for (where, _), document in zip(texts, found, strict=True):
        if document.ids.max() >= vocabulary:
            _check_ids(document.ids, where, vocabulary)
    return found


def _batches(texts: list[str], tokenizer: Tokenizer, *, continues: bool) -> Iterator[np.ndarray | None]:
    """The ids of each text, in order; None for one that is not Unicode."""
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and size < _AT_A_TIME:
            size, stop = size + len(texts[stop]), stop + 1
        batch = [each if _encodable(each) else None for each in texts[start:stop]]
        encoded = tokenizer.encode_all([each or "" for each in batch], continues=continues)
        for text, ids in zip(batch, encoded, strict=True):
            yield None if text is None else np.array(ids, np.int32)
        start = stop


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
