"""What `lm.save` leaves in a folder that is not empty, and the places where it cannot write."""

import errno
import json
import os
from dataclasses import replace

import pytest
from damage import CONFIG, make

import model
from model.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "tiny")


def as_two_files(folder):
    """The tokenizer as `vocab.json` and `merges.txt`, with "ab" the id 255 and a byte's the id 256."""
    backend = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = {**backend["vocab"], "<|endoftext|>": 257}
    other = next(token for token, id in vocab.items() if id == 255)
    vocab |= {"ab": 255, other: 256}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("a b\n")
    (folder / "tokenizer.json").unlink()
    return folder


def test_the_tokenizer_of_another_model_does_not_stay(folder, tmp_path):
    lm = model.load(as_two_files(folder), device="cpu")
    assert lm.tokenizer.encode("ab") == [255]
    other = make(tmp_path / "other")
    (other / "added_tokens.json").write_text('{"more": 258}')
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    for _ in range(2):  # over itself too
        lm.save(other)
    found = model.load(other, device="cpu")
    assert found.tokenizer.encode("ab") == [255]
    assert found.eos_token_ids == lm.eos_token_ids
    assert not (other / "added_tokens.json").exists()


def test_a_model_saved_over_itself_keeps_its_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    lm, files = model.load(folder, device="cpu"), {path.name for path in folder.iterdir()}
    lm.save(folder)
    assert {path.name for path in folder.iterdir()} == files
    assert model.load(folder, device="cpu").eos_token_ids == (5,)


def test_a_model_without_files_leaves_a_tokenizer_where_it_is(folder):
    config = model.load(folder, device="cpu").config
    model.from_config(config, device="cpu").save(folder)
    assert model.load(folder, device="cpu").tokenizer.encode("ab") == [256]


def test_a_tokenizer_of_two_files_keeps_its_bos_as_one(folder, tmp_path):
    """Beside `tokenizer.json`, which is written then, `add_bos_token` counts no more."""
    (as_two_files(folder) / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_prefix_space": true}')
    lm = model.load(folder, device="cpu")
    lm.save(tmp_path / "copy")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "copy")
    found = model.load(tmp_path / "copy", device="cpu").tokenizer
    assert found.encode("ab") == theirs("ab")["input_ids"] == lm.tokenizer.encode("ab")
    assert found.encode("ab")[0] == 257


def test_a_tokenizer_that_is_not_read_is_copied(folder, tmp_path):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    model.load(folder, device="cpu").save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == b"pieces"


def test_the_home_folder_is_that_of_load(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.load("~/tiny", device="cpu").save("~/copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_a_disk_that_is_full_leaves_the_model_before(folder, tmp_path, monkeypatch):
    """Also where it is another one, whose config.json would not fit its weights any more."""
    other = make(tmp_path / "other", replace(CONFIG, n_layer=1))
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    lm = model.load(folder, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(model.save, "_CHUNK", 64)
        patched.setattr("model.device.NumpyDevice.to_bytes", full_after(5))
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            lm.save(other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    lm.save(other)
    assert model.load(other, device="cpu").config == lm.config


def full_after(writes: int):
    """A stand-in for the bytes of an array, behind so many of which there is no more room."""
    calls = iter(range(writes))

    def to_bytes(self, array):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return array.tobytes()

    return to_bytes


@pytest.mark.parametrize("target", ["a\0b", "x" * 300, "~nobody-has-this-name/x", "file/x", "file", "is.safetensors"])
def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(folder, monkeypatch, target):
    lm = model.load(folder, device="cpu")
    monkeypatch.chdir(folder)
    (folder / "file").touch()
    (folder / "is.safetensors").mkdir()
    with pytest.raises(CheckpointError) as caught:
        lm.save(target)
    (line,) = caught.value.problems
    assert line.startswith(target[:1])
