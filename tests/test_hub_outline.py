"""A look at a model of the Hub: its headers are asked for, and not its weights."""

import json
import struct

import pytest
from hub_model import NAME, files, refusal, tensors
from typer.testing import CliRunner

from model.checkpoint import WEIGHTS_NAME, read_entries
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
    assert hub.sent[WEIGHTS_NAME] <= 100_001


def test_a_cached_model_needs_no_request(hub, tmp_path):
    hub.commit(NAME, files())
    folder = fetch(NAME)
    hub.forget()
    assert fetch(NAME, outline=tmp_path) == folder
    assert hub.requests == []


@pytest.mark.parametrize("body", [b"", b"short", b"\xff" * 200, struct.pack("<Q", 4) + b"{no}"])
def test_what_is_no_safetensors_file_is_said(hub, tmp_path, body):
    hub.commit(NAME, files() | {WEIGHTS_NAME: body})
    assert f"{WEIGHTS_NAME}: its header is not one of safetensors" in refusal(outline=tmp_path)


@pytest.mark.parametrize("command", ["info", "check"])
def test_commands_look_without_downloading(hub, tmp_path, command):
    hub.commit(NAME, large() | {"tokenizer.json": b""})
    done = CliRunner().invoke(app, [command, NAME, "--cache-dir", str(tmp_path)])
    assert done.exit_code == (command == "check"), done.output
    assert hub.sent[WEIGHTS_NAME] <= 100_001
    assert f"{NAME}/tokenizer.json" in done.output or command == "info"
    assert "outline-" not in done.output


def test_a_fault_of_the_model_names_the_model(hub, tmp_path):
    hub.commit(NAME, files() | {"config.json": b'{"model_type": "bert"}'})
    done = CliRunner().invoke(app, ["info", NAME, "--cache-dir", str(tmp_path)])
    assert str(done.exception).startswith(f"{NAME}/config.json: ")
