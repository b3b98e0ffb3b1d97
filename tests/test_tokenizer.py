"""Text to ids and back, and text that comes id by id."""

import functools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS
from tokenizers import pre_tokenizers

from model import Tokenizer, TokenizerError
from model.load import locate
from model.tokenizer import TextStream

FOLDER = locate("tiny-gpt2")
TOKENIZER = Tokenizer.from_folder(FOLDER)
SPECIAL = TOKENIZER.backend.token_to_id("<|endoftext|>")


def _characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself where that can be seen, else the next from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}


BYTE_OF = {character: byte for byte, character in _characters().items()}
BYTE_IDS = [TOKENIZER.backend.token_to_id(character) for _, character in sorted(_characters().items())]


def text_of(ids: list[int]) -> str:
    """What ids mean: the bytes of all tokens but special ones, joined, and only then read as UTF-8."""
    tokens = [TOKENIZER.backend.id_to_token(id) for id in ids if id != SPECIAL]
    return bytes(BYTE_OF[character] for token in tokens for character in token).decode("utf-8", errors="replace")


any_id = st.integers(0, TOKENIZER.size - 1)
texts = st.text(st.sampled_from("aé日本語🙂👩\u200d👧\ufffd\u0301 \n") | st.characters(codec="utf-8"), max_size=10)
# Any ids; single bytes, mostly no text; text a byte at a time, cut off somewhere; special tokens in between.
ids_of = (
    st.lists(any_id, max_size=30)
    | st.lists(st.sampled_from(BYTE_IDS) | any_id, max_size=30)
    | st.builds(lambda text, cut: [BYTE_IDS[byte] for byte in text.encode()][:cut], texts, st.integers(0, 40))
    | st.lists(st.sampled_from([SPECIAL, *(BYTE_IDS[byte] for byte in "日🙂".encode())]), max_size=20)
)


@settings(max_examples=500, deadline=None)
@given(ids=ids_of)
@example(ids=[BYTE_IDS[byte] for byte in "🙂".encode()[:3]])
@example(ids=[BYTE_IDS[0xE6], SPECIAL, BYTE_IDS[0x97], SPECIAL, BYTE_IDS[0xA5]])
@example(ids=[BYTE_IDS[byte] for byte in "a\ufffdb".encode()])
def test_pieces_join_to_the_text_and_never_have_half_a_character(ids):
    truth, stream, shown = text_of(ids), TextStream(TOKENIZER), ""
    assert TOKENIZER.decode(ids) == truth
    for id in ids:
        shown += stream.step(id)
        assert truth.startswith(shown)  # so there is no U+FFFD that the text does not have
    assert shown + stream.flush() == truth
    assert stream.flush() == ""


def test_a_character_comes_with_its_last_byte():
    stream = TextStream(TOKENIZER)
    pieces = [stream.step(BYTE_IDS[byte]) for byte in "é日🙂a".encode()]
    assert pieces == ["", "é", "", "", "日", "", "", "", "🙂", "a"]
    assert stream.flush() == ""


def test_bytes_that_never_became_text_come_at_the_end():
    stream = TextStream(TOKENIZER)
    assert [stream.step(BYTE_IDS[byte]) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("text", [None, 5, b"x", ["x"]])
def test_what_is_no_text_is_not_encoded(text):
    with pytest.raises(TokenizerError, match="text must be a string, got " + re.escape(repr(text))):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("ids", [None, 5, ["a"], [1.5], [1, -1], "12"])
def test_what_are_no_ids_is_not_decoded(ids):
    with pytest.raises(TokenizerError, match="ids must be whole numbers, 0 or more, got " + re.escape(repr(ids))):
        TOKENIZER.decode(ids)


def test_an_id_without_a_token_is_no_text():
    assert TOKENIZER.decode([2**31, 2**40, 10**30]) == ""


def test_special_tokens_are_no_text():
    stream = TextStream(TOKENIZER)
    ids = [*TOKENIZER.encode("The end"), SPECIAL, *TOKENIZER.encode(" of it")]
    assert "".join(map(stream.step, ids)) == TOKENIZER.decode(ids) == "The end of it"


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_encoding_and_decoding_is_the_identity(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= id < TOKENIZER.size for id in ids)


def test_the_size_is_one_more_than_the_largest_id():
    assert TOKENIZER.size == 1 + max(TOKENIZER.backend.get_vocab(with_added_tokens=True).values())


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """The bundled tokenizer as `vocab.json` and `merges.txt`."""
    folder, backend = tmp_path_factory.mktemp("tokenizer"), json.loads(TOKENIZER.to_json())["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, backend["merges"]), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(backend["vocab"]), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="In the beginning God created the heaven and the earth.<|endoftext|>And")
def test_vocabulary_and_merges_make_the_same_tokenizer(two_files, text):
    ids = TOKENIZER.encode(text)
    assert two_files.encode(text) == ids
    assert two_files.decode(ids) == TOKENIZER.decode(ids)
    assert two_files.size == TOKENIZER.size


# Other kinds: SentencePiece's, with a space before a text and bytes for what has no piece, and Llama 3's.


@functools.cache
def small(kind: str, prefix: bool = False) -> Tokenizer:
    backend = KINDS[kind]()
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(backend)


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] = ()) -> str:
    stream = TextStream(tokenizer, after)
    return "".join(map(stream.step, ids)) + stream.flush()


words = st.lists(st.sampled_from([*"aé日🙂 \n▁\ufffd", "the", " light", "  "]), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["llama2", "mistral", "llama3", "gpt2"]), text=words, special=st.booleans())
@example(kind="llama2", text=" the  light", special=True)
@example(kind="llama2", text="\ufffd🙂\n", special=True)
@example(kind="mistral", text="▁ a", special=True)
def test_pieces_join_to_the_librarys_text(kind, text, special):
    tokenizer = small(kind)
    ids = tokenizer.encode(text)
    if special:
        ids = [each for id in ids for each in (id, min(tokenizer.special_ids))]
    truth = tokenizer.backend.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == truth


def bytes_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """What ids of a SentencePiece vocabulary mean."""
    tokens = [tokenizer.backend.id_to_token(id) for id in ids if id not in tokenizer.special_ids]
    is_byte = re.compile("<0x..>").fullmatch
    return b"".join(bytes.fromhex(each[3:5]) if is_byte(each) else each.replace("▁", " ").encode() for each in tokens)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, small("llama2").size - 1) | st.integers(3, 258), max_size=20))
@example(ids=[3 + byte for byte in "日".encode()] + [3 + 0xFF])
@example(ids=[3 + 0xE6, 1, 3 + 0x97, 2, 3 + 0xA5])
def test_a_byte_that_is_no_text_takes_no_text_back(ids):
    """The library's own decoder makes U+FFFD of all bytes in a row where one of them is wrong."""
    tokenizer, stream, shown = small("llama2"), TextStream(small("llama2"), [5]), ""
    truth = bytes_of(tokenizer, ids).decode("utf-8", "replace")
    for id in ids:
        shown += stream.step(id)
        assert truth.startswith(shown)
    assert shown + stream.flush() == truth


def test_a_line_end_that_is_a_byte_comes_at_once():
    stream = TextStream(small("llama2"), [5])
    assert [stream.step(3 + byte) for byte in b"\n\n"] == ["\n", "\n"]
    assert [stream.step(3 + byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["llama2", "mistral", "metaspace", "llama3", "gpt2"]), parts=st.tuples(words, words))
@example(kind="llama2", parts=("the", " light"))
@example(kind="metaspace", parts=("the", "  light"))
def test_a_text_that_continues_another_keeps_its_spaces_and_has_no_bos(kind, parts):
    tokenizer = small(kind)
    if kind == "metaspace":  # has no bytes for what has no piece
        parts = tuple(re.sub("[^a-z ]", "", part) for part in parts)
    before, ids = tokenizer.encode(parts[0]), tokenizer.encode(parts[1], continues=True)
    wanted = parts[1] if kind in ("gpt2", "llama3") else parts[1].replace("▁", " ")
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.encode_all([parts[1]], continues=True) == [ids]
    if parts[0]:
        assert streamed(tokenizer, ids, before) == wanted
        whole = tokenizer.backend.decode([*before, *ids], skip_special_tokens=True)
        assert whole == tokenizer.backend.decode(before, skip_special_tokens=True) + wanted


def test_no_space_is_put_before_a_text_that_continues_another():
    tokenizer = small("gpt2", prefix=True)
    assert tokenizer.encode("light") == small("gpt2").encode(" light")
    assert tokenizer.encode("light", continues=True) == small("gpt2").encode("light")


def test_behind_special_tokens_alone_a_text_begins():
    tokenizer = small("llama2")
    ids = tokenizer.encode("the light", continues=True)
    spaced = tokenizer.encode(" the light", continues=True)
    assert streamed(tokenizer, spaced, [1]) == streamed(tokenizer, spaced) == "the light"
    assert streamed(tokenizer, ids, [1]) == "the light"
    assert streamed(tokenizer, spaced, [1, 5]) == " the light"
