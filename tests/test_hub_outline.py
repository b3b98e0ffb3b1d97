"""A look at a model of the Hub: its headers are asked for, and not its weights."""

import json
import struct

import pytest
from fake_hub import LFS_POINTER
from hub_model import NAME, files, tensors
from typer.testing import CliRunner

from model.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_entries
from model.cli.app import app
from model.hub import fetch
from model.load import plan

SPARSE = 2_000_000


def large() -> dict[str, bytes]:
    """The repository with so much vocabulary that its weights are longer than what is asked for at first."""
    found = files()
    config = json.loads(found["config.json"]) | {"vocab_size": SPARSE // 32}
    found["config.json"] = json.dumps(config).encode()
    header = json.loads(found[WEIGHTS_NAME][8 : 8 + struct.unpack("<Q", found[WEIGHTS_NAME][:8])[0]])
    end = 0
    for name, entry in header.items():
        if name == "wte.weight":
            entry["shape"] = [SPARSE // 32, 8]
        size = 4
        for length in entry["shape"]:
            size *= length
        entry["data_offsets"], end = [end, end + size], end + size
    text = json.dumps(header).encode()
    return found | {WEIGHTS_NAME: struct.pack("<Q", len(text)) + text + bytes(end)}


@pytest.mark.parametrize("shards", [1, 3])
def test_an_outline_has_the_headers_and_no_weights(hub, tmp_path, shards):
    hub.commit(NAME, files(shards=shards))
    folder = fetch(NAME, outline=tmp_path)
    assert folder == tmp_path
    outlined = {name: (entry.dtype, entry.shape) for name, entry in read_entries(folder).items()}
    assert outlined == {name: ("F32", array.shape) for name, array in tensors().items()}
    whole = read_entries(fetch(NAME))  # nothing of it stood for the model in the cache
    assert {name: (entry.dtype, entry.shape) for name, entry in whole.items()} == outlined


def test_the_weights_stay_where_they_are(hub, tmp_path):
    hub.commit(NAME, large())
    assert plan(fetch(NAME, outline=tmp_path), headers_only=True).config.vocab_size == SPARSE // 32
    assert (tmp_path / WEIGHTS_NAME).stat().st_size > SPARSE
    assert hub.sent[WEIGHTS_NAME] <= 100_000


def test_a_cached_model_needs_no_request(hub, tmp_path):
    hub.commit(NAME, files())
    folder = fetch(NAME)
    hub.forget()
    assert fetch(NAME, outline=tmp_path) == folder
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: b"", "0 bytes are too few"),
        (lambda _: b"short", "5 bytes are too few"),
        (lambda _: LFS_POINTER, "git lfs pull"),
        (lambda _: b"\xff" * 200, "not a safetensors file"),
        (lambda _: struct.pack("<Q", 4) + b"{no}", "the header is damaged"),
        (lambda whole: whole[:-100], "truncated"),
        (lambda whole: whole + b"12345", "5 bytes follow the last tensor"),
    ],
)
@pytest.mark.parametrize("make", [files, large])
def test_damage_is_a_problem_in_the_words_of_the_loader_without_a_download(hub, tmp_path, make, change, says):
    hub.commit(NAME, make() | {WEIGHTS_NAME: change(make()[WEIGHTS_NAME])})
    done = CliRunner().invoke(app, ["check", NAME, "--cache-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert f"problem: {NAME}/{WEIGHTS_NAME}: " in done.output
    assert says in done.output
    assert hub.sent.get(WEIGHTS_NAME, 0) <= 100_000


def test_a_long_header_is_read_whole(hub, tmp_path):
    weights = large()[WEIGHTS_NAME]
    length = struct.unpack("<Q", weights[:8])[0]
    padded = struct.pack("<Q", 150_000) + weights[8 : 8 + length].ljust(150_000) + weights[8 + length :]
    hub.commit(NAME, large() | {WEIGHTS_NAME: padded})
    assert read_entries(fetch(NAME, outline=tmp_path))["wte.weight"].shape == (SPARSE // 32, 8)
    assert hub.sent[WEIGHTS_NAME] == 150_008


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "only pickled weights"),
        ({"config.json": b"{}"}, "no weights to read"),
        ({"adapter_config.json": b"{}"}, "no config.json"),
        ({"config.json": b"{}", INDEX_NAME: b'{"weight_map": {"a": "../x.safetensors"}}'}, "is refused"),
        ({"config.json": b"{}", INDEX_NAME: b'{"weight_map": {"a": "x.safetensors"}}'}, "does not have"),
    ],
)
def test_a_repository_that_holds_no_model_is_a_problem_of_check(hub, tmp_path, content, says):
    hub.commit(NAME, content)
    done = CliRunner().invoke(app, ["check", NAME, "--cache-dir", str(tmp_path), "--json"])
    document = json.loads(done.output)
    assert (done.exit_code, document["ok"], document["source"]) == (1, False, NAME)
    assert says in "".join(document["problems"])


@pytest.mark.parametrize("command", ["info", "check"])
def test_commands_look_without_downloading(hub, tmp_path, command):
    hub.commit(NAME, large() | {"tokenizer.json": b""})
    done = CliRunner().invoke(app, [command, NAME, "--cache-dir", str(tmp_path)])
    assert done.exit_code == (command == "check"), done.output
    assert hub.sent[WEIGHTS_NAME] <= 100_000
    assert f"{NAME}/tokenizer.json" in done.output or command == "info"
    assert "outline-" not in done.output


def test_a_fault_of_the_model_names_the_model(hub, tmp_path):
    hub.commit(NAME, files() | {"config.json": b'{"model_type": "bert"}'})
    done = CliRunner().invoke(app, ["info", NAME, "--cache-dir", str(tmp_path)])
    assert str(done.exception).startswith(f"{NAME}/config.json: ")
