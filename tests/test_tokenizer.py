"""Text to ids and back, and text that comes id by id."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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


_ADDED = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"__type": "AddedToken"}


def write_two_files(folder: Path, **beside: dict) -> Path:
    """The bundled tokenizer as `vocab.json` and `merges.txt`, and other documents beside them."""
    backend = json.loads(TOKENIZER.to_json())["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, backend["merges"]), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    for name, document in {"vocab": backend["vocab"], **beside}.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    return Tokenizer.from_folder(write_two_files(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="In the beginning God created the heaven and the earth.<|endoftext|>And")
def test_vocabulary_and_merges_make_the_same_tokenizer(two_files, text):
    ids = TOKENIZER.encode(text)
    assert two_files.encode(text) == ids
    assert two_files.decode(ids) == TOKENIZER.decode(ids)
    assert two_files.size == TOKENIZER.size


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"add_prefix_space": True}},
        {"added_tokens": {"<|pad|>": TOKENIZER.size}},
        {"added_tokens": {"<|pad|>": TOKENIZER.size}, "special_tokens_map": {"pad_token": "<|pad|>"}},
        {
            "added_tokens": {"<|pad|>": TOKENIZER.size},
            "tokenizer_config": {"pad_token": {"content": "<|pad|>"} | _ADDED},
        },
        {"special_tokens_map": {"additional_special_tokens": ["and"]}},
    ],
    ids=str,
)
def test_the_files_beside_vocabulary_and_merges_mean_what_transformers_takes_them_for(tmp_path, beside):
    theirs = pytest.importorskip("transformers").GPT2Tokenizer.from_pretrained(write_two_files(tmp_path, **beside))
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("And land", " he", "a<|pad|> b<|endoftext|>c"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["added_tokens", "special_tokens_map", "tokenizer_config"])
def test_a_damaged_file_beside_vocabulary_and_merges_is_named(tmp_path, name):
    write_two_files(tmp_path, **{name: ["a", "b"]})
    with pytest.raises(TokenizerError, match=f"{name}.json: must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)
