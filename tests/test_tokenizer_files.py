"""A folder's tokenizer gives the ids of transformers' own, whatever its files say and contradict."""

import json

import pytest
import small_tokenizers
from damage import make
from small_tokenizers import KINDS, TEXTS, gpt2, llama2, llama3, write, write_pair

import model
from model import LoadNotice, Tokenizer, TokenizerError
from model.check import check

transformers = pytest.importorskip("transformers")

FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
PAD = FLAGS | {"content": "<pad>", "rstrip": True, "special": True}

# What `tokenizer_config.json` may say.
SETTINGS = [
    None,
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True, "clean_up_tokenization_spaces": True},
    {"add_bos_token": False, "add_prefix_space": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"split_special_tokens": True},
    {"bos_token": None, "pad_token": "<pad>", "image_token": "the", "extra_special_tokens": ["light"]},
    {"eos_token": FLAGS | {"__type": "AddedToken", "content": "earth"}, "additional_special_tokens": ["light"]},
    {"added_tokens_decoder": {"9999": PAD, "1": FLAGS | {"content": "<s>", "special": True}}, "eos_token": "God"},
    {"added_tokens_decoder": {"0": FLAGS | {"content": "God", "special": False}}, "pad_token": "God"},
]
NAMES = {"pad_token": "<pad>", "bos_token": FLAGS | {"content": "<s>"}, "additional_special_tokens": ["earth"]}


def compare(folder) -> None:
    """Ids of texts, and the text of these ids without special tokens."""
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_whatever_stands_beside_tokenizer_json(kind, architecture, tmp_path):
    for number, settings in enumerate(SETTINGS):
        beside = {} if settings is None else {"tokenizer_config": settings}
        for others in ({}, {"special_tokens_map": NAMES, "added_tokens": {"<pad>": 999}}):
            folder = tmp_path / f"{number}-{len(others)}"
            folder.mkdir()
            compare(write(folder, KINDS[kind](), architecture, **beside, **others))


def test_the_class_in_config_json_counts_where_no_other_is_named(tmp_path):
    config = {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}
    compare(write(tmp_path, llama2(), None, config=config))


SIZE = len(json.loads(small_tokenizers.byte_level().to_str())["model"]["vocab"]) + 1


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"tokenizer_config": {"add_bos_token": True}},
        {"tokenizer_config": {"add_bos_token": False, "add_prefix_space": True}},
        {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}},
        {"tokenizer_config": {"add_bos_token": True, "bos_token": None}},
        {"tokenizer_config": {"add_bos_token": True}, "special_tokens_map": NAMES},
        {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): PAD}, "add_bos_token": True}},
        {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): PAD}}, "special_tokens_map": NAMES},
        {"tokenizer_config": {"pad_token": "<pad>", "extra_special_tokens": ["light"]}, "added_tokens": {"</s>": SIZE}},
        {"tokenizer_config": {"split_special_tokens": True}, "special_tokens_map": NAMES},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers_for_vocabulary_and_merges(beside, tmp_path):
    compare(write_pair(tmp_path, **beside))


def test_a_file_that_is_not_gpt2s_where_the_class_is_says_so(tmp_path):
    folder = write(tmp_path, llama3(), "llama", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (notice,) = Tokenizer.from_folder(folder).notices
    assert notice.startswith(f"{folder / 'tokenizer.json'}: the text is cut up in GPT-2's way, and not in the file's")
    assert Tokenizer.from_folder(write(tmp_path, llama3(), "llama", tokenizer_config={})).notices == []
    assert Tokenizer.from_folder(write(tmp_path, gpt2(), "gpt2")).notices == []


def test_a_model_other_than_bpe_stays_what_it_is(tmp_path):
    """Where GPT2Tokenizer would make a BPE without merges of it."""
    backend = small_tokenizers.Tokenizer(small_tokenizers.models.WordLevel({"<unk>": 0, "light": 1}, "<unk>"))
    backend.pre_tokenizer = small_tokenizers.pre_tokenizers.Whitespace()
    assert Tokenizer.from_folder(write(tmp_path, backend, "gpt2")).encode("light of light") == [1, 0, 1]


@pytest.mark.parametrize("write_files", [write_pair, lambda folder, **beside: write(folder, gpt2(), "gpt2", **beside)])
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
def test_a_damaged_file_beside_the_others_is_named(name, write_files, tmp_path):
    write_files(tmp_path, **{name: ["a"]})
    with pytest.raises(TokenizerError, match=f"{name}.json: must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "values",
    [["a"], {"x": PAD}, {"1": "<pad>"}, {"1": {"content": 5}}, {"-1": PAD}, {"9" * 5000: PAD}],
    ids=lambda value: str(value)[:30],
)
def test_added_tokens_that_cannot_be_are_refused_by_the_file_and_its_key(values, tmp_path):
    write_pair(tmp_path, tokenizer_config={"added_tokens_decoder": values})
    with pytest.raises(TokenizerError, match=r'tokenizer_config\.json: added_tokens_decoder must map "ID" to '):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
def test_half_of_a_surrogate_pair_in_a_file_is_one_sentence(name, tmp_path):
    values = {"\ud800": 300} if name == "added_tokens" else {"pad_token": "\ud800"}
    write_pair(tmp_path, **{name: values})
    with pytest.raises(TokenizerError, match=rf"{name}\.json: has half of a surrogate pair in it"):
        Tokenizer.from_folder(tmp_path)


def test_added_ids_that_the_vocabulary_does_not_give_are_refused(tmp_path):
    write_pair(tmp_path, tokenizer_config={"added_tokens_decoder": {"999": PAD}})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: gives '<pad>' the id 999, which does"):
        Tokenizer.from_folder(tmp_path)
    write_pair(tmp_path, tokenizer_config={}, added_tokens={"<pad>": True})
    with pytest.raises(TokenizerError, match=r"added_tokens\.json: must map every token to its id, got True"):
        Tokenizer.from_folder(tmp_path)


def test_sentencepiece_alone_is_a_model_without_tokenizer_and_a_notice_that_says_what_to_do(tmp_path):
    folder = make(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    report = check(folder)
    assert report.problems == []
    (notice,) = report.notices
    assert notice == (
        f"{folder / 'tokenizer.model'}: is SentencePiece, which is not read: prompts can only be token ids; "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
    )
    with pytest.warns(LoadNotice, match="is SentencePiece, which is not read"):
        assert model.load(folder, device="cpu").tokenizer is None
