"""Training data: what each form of a source comes to, what is refused, and that packing loses and leaks nothing."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from damage import LFS_POINTER
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import llama2
from tokenizers import processors

import model
from model.errors import DataError
from model.finetune.data import Document, read_documents, split_documents
from model.finetune.packing import IGNORE, order, pack
from model.load import locate
from model.tokenizer import Tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(locate("tiny-gpt2"))


@pytest.fixture
def lines(tmp_path):
    def write(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records))
        return path

    return write


def texts(documents, tokenizer):
    return [tokenizer.backend.decode(each.ids.tolist(), skip_special_tokens=False) for each in documents]


def counted(document, tokenizer):
    """The text of the targets that count."""
    return tokenizer.backend.decode(document.ids[document.wanted].tolist(), skip_special_tokens=False)


def test_a_text_file_is_one_document_ended_by_eos(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffIn the beginning\r\n\n\nGod".encode())
    (document,) = read_documents(np.str_(path), tokenizer)  # which has __array__, as arrays do
    assert document.ids.tolist() == [*tokenizer.encode("In the beginning\r\n\n\nGod"), EOS]
    assert document.ids.dtype == np.int32
    assert document.wanted.all()


def test_a_separator_stands_between_documents_and_empty_ones_are_none(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\n\n \n\nthree\n\n")
    found = read_documents(str(path), tokenizer, separator="\n\n")
    assert texts(found, tokenizer) == ["one\ntwo<|endoftext|>", "three<|endoftext|>"]


def test_strings_are_documents_and_a_special_token_spelled_out_is_that_token(tokenizer):
    found = read_documents(["And God said", "a<|endoftext|>b"], tokenizer)
    assert [each.ids.tolist().count(EOS) for each in found] == [1, 2]
    assert texts(found, tokenizer) == ["And God said<|endoftext|>", "a<|endoftext|>b<|endoftext|>"]


def test_many_documents_of_every_length_come_back_in_order(tokenizer, monkeypatch):
    monkeypatch.setattr("model.finetune.data._AT_A_TIME", 50)
    wanted = ["And it came to pass " * (number % 7 + 1) for number in range(40)]
    assert texts(read_documents(wanted, tokenizer), tokenizer) == [f"{each}<|endoftext|>" for each in wanted]


def test_prompt_and_completion_are_encoded_as_generation_meets_them(tokenizer, lines):
    record = {"prompt": "And Moses", "completion": "es said", "id": 3}
    (whole,) = read_documents(lines(record), tokenizer)
    (masked,) = read_documents(lines(record), tokenizer, mask_prompt=True)
    wanted = [*tokenizer.encode("And Moses"), *tokenizer.encode("es said"), EOS]
    assert whole.ids.tolist() == masked.ids.tolist() == wanted
    assert whole.wanted.all()
    assert counted(masked, tokenizer) == "es said<|endoftext|>"


def test_a_conversation_counts_what_the_assistant_says_and_its_eos(tokenizer, lines):
    turns = [("system", "Be brief."), ("user", "How far?"), ("assistant", "Two days."), ("user", "And back?"),
             ("assistant", "Two more.")]  # fmt: skip
    path = lines({"messages": [{"role": role, "content": content} for role, content in turns]})
    (document,) = read_documents(path, tokenizer, mask_prompt=True)
    assert texts([document], tokenizer) == [
        "System: Be brief.\nUser: How far?\nAssistant: Two days.<|endoftext|>"
        "\nUser: And back?\nAssistant: Two more.<|endoftext|>"
    ]
    assert counted(document, tokenizer) == " Two days.<|endoftext|> Two more.<|endoftext|>"
    prompt = tokenizer.encode("System: Be brief.\nUser: How far?\nAssistant:")
    assert document.ids[: len(prompt)].tolist() == prompt
    (whole,) = read_documents(path, tokenizer)
    assert whole.wanted.all()


def test_a_conversation_that_a_user_ends_ends_with_eos(tokenizer, lines):
    (document,) = read_documents(lines({"messages": [{"role": "user", "content": "Peace."}]}), tokenizer)
    assert texts([document], tokenizer) == ["User: Peace.<|endoftext|>"]


@pytest.fixture(scope="module")
def pieces():
    return Tokenizer(llama2())


def test_a_document_begins_with_the_bos_of_a_tokenizer_that_has_one_and_ends_with_eos(pieces, lines, tmp_path):
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=pieces.backend)
    wanted = [[*theirs(text)["input_ids"], 2] for text in ("In the light", "a</s>b")]
    assert wanted[0][0] == 1
    found = read_documents(["In the light", "a</s>b"], pieces, eos=2)
    assert [each.ids.tolist() for each in found] == wanted
    assert all(each.wanted.all() for each in found)
    (document,) = read_documents(lines({"text": "In the light"}), pieces, eos=2)
    assert document.ids.tolist() == wanted[0]
    assert "document 0: there is no token in it" in answer(["", "a"], pieces, eos=2)


def test_a_completion_goes_on_where_its_prompt_ends(pieces, lines):
    record = {"prompt": "In the", "completion": " beginning"}
    (document,) = read_documents(lines(record), pieces, eos=2, mask_prompt=True)
    assert document.ids.tolist() == [*pieces.encode("In the"), *pieces.encode(" beginning", continues=True), 2]
    assert pieces.decode(document.ids) == "In the beginning"
    assert pieces.decode(pieces.encode("In the beginning")) == "In the beginning"
    assert pieces.backend.decode(document.ids[document.wanted].tolist(), skip_special_tokens=False) == "beginning</s>"


def test_a_conversation_has_one_bos(pieces, lines):
    said = [("user", "light?"), ("assistant", "the light"), ("user", "day?"), ("assistant", "the day")]
    messages = [{"role": role, "content": content} for role, content in said]
    (document,) = read_documents(lines({"messages": messages}), pieces, eos=2)
    assert document.ids.tolist().count(1) == 1
    whole = "User: light?\nAssistant: the light</s>\nUser: day?\nAssistant: the day</s>"
    assert pieces.backend.decode(document.ids.tolist(), skip_special_tokens=False) == f"<s> {whole}"


def test_an_eos_that_the_tokenizer_has_put_behind_a_text_is_not_there_twice(lines):
    backend = llama2()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = Tokenizer(backend)
    (document,) = read_documents(["the light"], tokenizer, eos=2)
    assert document.ids.tolist() == tokenizer.encode("the light")
    (document,) = read_documents(lines({"prompt": "the", "completion": " light"}), tokenizer, eos=2)
    assert document.ids.tolist() == [*tokenizer.encode("the"), *tokenizer.encode(" light", continues=True), 2]


def test_a_line_end_of_unicode_inside_a_json_string_ends_no_line(tokenizer, lines):
    path = lines('{"text": "a\u2028b\u0085c"}', "", {"text": "d"})
    assert texts(read_documents(path, tokenizer), tokenizer) == ["a\u2028b\u0085c<|endoftext|>", "d<|endoftext|>"]


def test_a_stream_of_ids_is_cut_behind_each_eos_and_rows_are_documents(tmp_path):
    stream = np.array([5, 6, 0, 7, 0, 0, 8, 9], np.uint16)
    np.save(tmp_path / "a.npy", stream)
    for source in (stream, tmp_path / "a.npy", torch.from_numpy(stream.astype(np.int16))):
        found = read_documents(source, None, eos=0, vocabulary=10)
        assert [each.ids.tolist() for each in found] == [[5, 6, 0], [7, 0], [0], [8, 9]]
    rows = read_documents(np.arange(6).reshape(2, 3), None, vocabulary=6)
    assert [each.ids.tolist() for each in rows] == [[0, 1, 2], [3, 4, 5]]


def answer(source, tokenizer, **options):
    with pytest.raises(DataError) as fault:
        read_documents(source, tokenizer, **options)
    assert all(problem.count("\n") == 0 for problem in fault.value.problems)
    return str(fault.value)


BAD_LINES = [
    ("{", "line 2: not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("5", "line 2: must be a JSON object, got int"),
    ('{"a": 1}', 'line 2: must have "text", or "prompt" and "completion", or "messages"; it has a'),
    ('{"text": "a", "messages": []}', "it has messages, text"),
    ('{"text": 5}', 'line 2: "text" must be a string, got int'),
    ('{"text": ""}', "line 2: there is no token in it"),
    ('{"text": "\\ud800"}', "line 2: is not valid Unicode"),
    ('{"prompt": "a"}', 'line 2: "completion" is missing'),
    ('{"completion": "a"}', 'line 2: "prompt" is missing'),
    ('{"prompt": "a", "completion": ""}', 'line 2: "completion" is empty'),
    ('{"messages": []}', 'line 2: "messages" must be a list with a message at least'),
    ('{"messages": ["a"]}', "line 2: message 0: must be an object, got str"),
    ('{"messages": [{"role": "user"}]}', 'line 2: message 0: "content" is missing'),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "one of system, user, assistant, got 'tool'"),
    ('{"messages": [{"role": "assistant", "content": ""}]}', 'message 0: "content" of the assistant is empty'),
]


@pytest.mark.parametrize(("line", "wanted"), BAD_LINES)
def test_a_bad_line_is_named(tokenizer, lines, line, wanted):
    assert wanted in answer(lines({"text": "good"}, line), tokenizer)


def test_every_bad_line_is_told_up_to_a_few(tokenizer, lines):
    said = answer(lines(*["{"] * 11), tokenizer).splitlines()
    assert len(said) == 9
    assert said[7].split(": ")[1] == "line 8"
    assert said[8].endswith("3 more are at fault")


def test_masking_asks_for_prompts(tokenizer, lines, tmp_path):
    assert 'line 1: has "text" alone' in answer(lines({"text": "a"}), tokenizer, mask_prompt=True)
    user = {"messages": [{"role": "user", "content": "a"}]}
    assert "none of the assistant" in answer(lines(user), tokenizer, mask_prompt=True)
    assert "no prompts to mask" in answer(["a"], tokenizer, mask_prompt=True)
    assert "no prompts to mask" in answer(tmp_path / "a.txt", tokenizer, mask_prompt=True)


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    def file(name, raw):
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    assert "No such file" in answer(tmp_path / "none.txt", tokenizer)
    assert "No such file" in answer(tmp_path / "none.npy", tokenizer)
    assert "Is a directory" in answer(
        file("a.txt", b"").parent.joinpath("d.txt").mkdir() or tmp_path / "d.txt", tokenizer
    )
    assert "the file is empty" in answer(file("a.txt", b""), tokenizer)
    assert "there is no text in it" in answer(file("a.txt", b" \n"), tokenizer)
    assert "there is no text in it" in answer(file("a.jsonl", b"\n\n"), tokenizer)
    assert "line 3 is not UTF-8 text: byte 0xff at 5" in answer(file("a.txt", b"a\nb\nc\xff"), tokenizer)
    assert "Git LFS pointer" in answer(file("a.txt", b"version https://git-lfs\n\xff"), tokenizer)
    assert "Git LFS pointer" in answer(file("a.txt", LFS_POINTER), tokenizer)
    assert "Git LFS pointer" in answer(file("a.jsonl", LFS_POINTER), tokenizer)
    assert "must be .txt, .jsonl or .npy" in answer(file("a.csv", b"a"), tokenizer)
    assert "not an array of token ids" in answer(file("a.npy", b"\x93NUMPY\x01"), tokenizer)
    # NumPy's own words are how to load a pickle.
    assert answer(file("a.npy", b"hello"), tokenizer).endswith(
        "not an array of token ids (.npy): it does not begin like one"
    )
    assert "cannot be read: embedded null byte" in answer("a\0.txt", tokenizer)
    assert "separator" in answer(file("a.jsonl", b"{}"), tokenizer, separator="\n")
    assert "separator" in answer(file("a.txt", b"a"), tokenizer, separator="")
    assert "separator" in answer(file("a.txt", b"a"), tokenizer, separator=5)
    assert r"separator '\\n' does not occur in it" in answer(file("a.txt", b"a\nb"), tokenizer, separator=r"\n")


def test_arrays_that_are_no_token_ids(tokenizer, tmp_path):
    assert "token 1 has the id 4096, outside the vocabulary of 4096" in answer(np.array([1, 4096]), tokenizer)
    assert "token 0 has the id -1" in answer(np.array([-1]), tokenizer)
    assert "whole numbers" in answer(np.array([0.5]), tokenizer)
    assert "whole numbers" in answer(torch.zeros(3, dtype=torch.bfloat16), tokenizer)
    assert "cannot be read as an array" in answer(torch.zeros(3, device="meta"), tokenizer)
    assert "whole numbers" in answer(np.zeros((1, 1, 1), int), tokenizer)
    assert "there is no token in it" in answer(np.zeros((3, 0), int), tokenizer)
    assert "size of the vocabulary" in answer(np.array([1]), None)
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    assert "not an array of token ids" in answer(tmp_path / "a.npy", tokenizer)
    np.savez(tmp_path / "a.npz", np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "several arrays" in answer(tmp_path / "a.npy", tokenizer)


def test_text_wants_a_tokenizer_whose_ids_the_model_has(tokenizer):
    assert "no tokenizer" in answer(["a"], None)
    assert "document 1: token" in answer(["!", "And Moses"], tokenizer, vocabulary=200)
    assert "document 1: must be a string" in answer(["a", 5], tokenizer)
    assert "document 0: there is no token in it" in answer(["", "a"], tokenizer)
    assert "there is no text in it" in answer([], tokenizer)
    assert "got dict" in answer({}, tokenizer)


def test_a_text_that_no_token_could_end_is_refused_with_what_to_do(tokenizer):
    backend = type(tokenizer.backend).from_str(tokenizer.to_json().replace("<|endoftext|>", "<|end|>"))
    assert answer(["a"], Tokenizer(backend)).endswith("no <|endoftext|>; name the id in its config.json")


def test_data_errors_are_public_and_kinds_of_model_errors():
    assert issubclass(model.DataError, model.ModelError)


def numbered(*lengths):
    """Documents in which every token differs from every other."""
    ends = np.cumsum([0, *lengths]) + 1
    return [
        Document(np.arange(start, stop, dtype=np.int32), np.ones(stop - start, bool))
        for start, stop in itertools.pairwise(ends)
    ]


@settings(deadline=None)
@given(st.data())
def test_packing_keeps_every_target_once_apart_and_in_order(data):
    lengths = data.draw(st.lists(st.integers(1, 23), max_size=20))
    context = data.draw(st.integers(1, 9))
    documents = numbered(*lengths)
    for document in documents:
        flags = data.draw(st.lists(st.booleans(), min_size=len(document.ids), max_size=len(document.ids)))
        document.wanted[:] = flags
    windows = pack(documents, context)
    assert all(each.dtype == np.int32 and each.shape == (len(windows.tokens), context) for each in windows)

    # Every target that counts, once, behind the token before it.
    pairs = [
        (before, after)
        for document in documents
        for before, after, wanted in zip(
            document.ids[:-1].tolist(), document.ids[1:].tolist(), document.wanted[1:].tolist(), strict=True
        )
        if wanted
    ]
    has = windows.targets != IGNORE
    found = zip(windows.tokens[has].tolist(), windows.targets[has].tolist(), strict=True)
    assert sorted(found) == sorted(pairs)

    owner = {int(token): number for number, each in enumerate(documents) for token in each.ids}
    for tokens, targets, positions, numbers in zip(*windows, strict=True):
        assert (targets != IGNORE).any()
        assert (np.diff(numbers) >= 0).all()
        for number in np.unique(numbers):
            piece = numbers == number
            if (tokens[piece] == 0).all():  # no document has a 0
                assert (targets[piece] == IGNORE).all()
                assert number == numbers[-1]
                continue
            # One document, whole and in a row, or a cut of a long one; positions begin anew.
            assert len({owner[token] for token in tokens[piece].tolist()}) == 1
            assert (np.diff(tokens[piece]) == 1).all()
            assert positions[piece].tolist() == list(range(piece.sum()))
            length = len(documents[owner[int(tokens[piece][0])]].ids)
            assert piece.sum() == length or length > context
    seen = windows.tokens[windows.tokens > 0]
    assert len(np.unique(seen)) == len(seen)


def test_only_a_long_document_is_cut_and_little_is_padding():
    lengths = np.random.default_rng(0).integers(2, 400, 500)
    windows = pack(numbered(*lengths), 512)
    assert (windows.tokens > 0).sum() == lengths.sum()
    assert (windows.tokens == 0).mean() < 0.02


def test_a_text_of_whole_windows_is_its_windows_in_order():
    windows = pack(numbered(12), 4)
    assert windows.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert windows.targets.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, IGNORE]]
    assert (windows.positions == [0, 1, 2, 3]).all()


def test_ten_million_tokens_are_packed_in_seconds():
    lengths = np.random.default_rng(0).integers(2, 200, 100_000)
    documents = numbered(*lengths)
    start = time.process_time()
    windows = pack(documents, 1024)
    assert time.process_time() - start < 10  # 0.8 s on an idle core
    assert (windows.targets != IGNORE).sum() == (lengths - 1).sum()


def test_a_split_is_of_the_seed_alone_and_loses_nothing():
    documents = numbered(*range(1, 41))
    train, validation = split_documents(documents, 0.25, 7)
    assert len(validation) == 10
    assert sorted(len(each.ids) for each in train + validation) == list(range(1, 41))
    again = split_documents(documents, 0.25, 7)[1]
    other = split_documents(documents, 0.25, 8)[1]
    assert [each.ids.tolist() for each in again] == [each.ids.tolist() for each in validation]
    assert [each.ids.tolist() for each in other] != [each.ids.tolist() for each in validation]


@pytest.mark.parametrize(("count", "share", "kept"), [(2, 0.9, 1), (10, 0.01, 1), (10, 0.0, 0)])
def test_a_split_leaves_one_for_each_side(count, share, kept):
    train, validation = split_documents(numbered(*[3] * count), share, 0)
    assert (len(train), len(validation)) == (count - kept, kept)


def test_a_single_document_is_cut_near_its_end():
    train, validation = split_documents(numbered(100), 0.1, 0)
    assert [each.ids.tolist() for each in train + validation] == [list(range(1, 91)), list(range(91, 101))]
    with pytest.raises(DataError, match="3 tokens is too short"):
        split_documents(numbered(3), 0.5, 0)


@pytest.mark.parametrize("share", [0.01, 0.97, 0.9999])
def test_a_single_document_leaves_two_tokens_for_each_side(share):
    for length in (4, 12, 26):
        sizes = [len(side[0].ids) for side in split_documents(numbered(length), share, 0)]
        assert min(sizes) == 2
        assert sum(sizes) == length


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_is_refused(share):
    with pytest.raises(DataError, match="from 0 to below 1"):
        split_documents(numbered(5, 5), share, 0)


def test_an_epochs_order_is_a_permutation_known_beforehand():
    assert sorted(order(100, 3, 5).tolist()) == list(range(100))
    # The bits of Philox4x64-10 are fixed, so these are the same on every machine and release.
    assert order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(10, 1, 0).tolist() != order(10, 0, 0).tolist() != order(10, 0, 1).tolist()
    assert order(0, 0, 0).tolist() == []
