"""How `model.hub.fetch` fails: one sentence for whatever the Hub, the network or the disk does."""

import json
import os
import subprocess
import sys

import pytest
from fake_hub import LFS_POINTER, WEB_PAGE
from hub_model import NAME, TOKEN, constants, files, huggingface_hub, refusal, tensors

from model.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_entries
from model.errors import CheckpointError
from model.files import CONVERT
from model.hub import fetch

# What is refused, and how failures read


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_before_any_download(hub, pickle):
    hub.commit(NAME, {"config.json": b"{}", "tf_model.h5": b"h5", pickle: b"PK\x03\x04"})
    line = refusal()
    assert pickle in line
    assert CONVERT in line
    assert hub.downloads() == set()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({WEIGHTS_NAME: b""}, "no config.json"),
        ({"config.json": b"{}"}, "no weights"),
        ({"config.json": b"{}", "tf_model.h5": b"h5"}, "no weights"),
        ({}, "no config.json"),
    ],
)
def test_a_repository_that_holds_no_model_is_refused_before_any_download(hub, content, words):
    hub.commit(NAME, content)
    assert words in refusal()
    assert hub.downloads() == set()


@pytest.mark.parametrize(
    "shard",
    [
        "../../stolen.safetensors",
        "/stolen.safetensors",
        "a/../../stolen.safetensors",
        "..\\stolen.safetensors",
        "C:\\stolen.safetensors",
        "stolen.bin",
        "stolen\0.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_never_asked_for(hub, shard):
    index = json.dumps({"weight_map": {"wte.weight": shard}}).encode()
    hub.commit(NAME, {"config.json": b"{}", INDEX_NAME: index, shard: b"stolen"})
    assert "is refused" in refusal()
    assert not any("stolen" in request for request in hub.requests)
    assert "is refused" in refusal(revision=next(iter(hub.repos[NAME].commits)), local_files_only=True)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b'{"weight_map": {"wte.weight": "model-1.safetensors"}}', "names model-1.safetensors, which"),
        (b'{"weight_map": {"wte.weight": 1}}', "weight_map must be"),
        (b'{"weight_map": {}}', "weight_map must be"),
        (LFS_POINTER, "Git LFS pointer"),
    ],
)
def test_an_index_that_cannot_be_followed_is_named(hub, index, words):
    hub.commit(NAME, {"config.json": b"{}", INDEX_NAME: index})
    assert words in refusal()


@pytest.mark.parametrize("name", ["a/b/c", "./folder", "owner/", "a b", "owner/--x", "x.git", "/tmp/model", "", ".."])
def test_what_cannot_be_a_repository_is_refused_without_a_request(hub, name):
    assert "neither a file nor a Hub model" in refusal(name)
    assert hub.requests == []


def test_a_model_that_does_not_exist_is_named(hub):
    assert "no such model, or a private one" in refusal()
    assert "no such model, or a private one" in refusal(token=TOKEN)


def test_a_revision_that_does_not_exist_is_named(hub):
    hub.commit(NAME, files())
    line = refusal(revision="v9")
    assert f"{NAME} at v9" in line
    assert "no such branch, tag or commit" in line


def test_a_private_model_needs_its_token(hub):
    hub.commit(NAME, files())
    hub.repos[NAME].token = TOKEN
    assert "private" in refusal()
    assert "refuses the token (401)" in refusal(token="hf_other")
    hub.forget()
    fetch(NAME, token=TOKEN)
    assert set(hub.authorizations) == {f"Bearer {TOKEN}"}


def test_a_gated_model_names_the_page_of_its_licence(hub):
    hub.commit(NAME, files())
    hub.repos[NAME].gated = True
    line = refusal(token=TOKEN)
    assert f"accept the licence at {hub.url}/{NAME}," in line
    assert "config.json" in line


def test_a_token_that_is_asked_for_but_not_stored_is_named(hub):
    assert "no token is stored" in refusal(token=True)


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN}\u2026"])
def test_a_token_with_a_line_end_is_named_but_not_shown(hub, token):
    hub.commit(NAME, files())
    assert "the token has a character" in refusal(token=token)


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        ("", 403, "forbids it (403)"),
        ("", 429, "too many requests"),
        ("", 500, "in trouble (500)"),
        ("", 503, "in trouble (503)"),
        ("", 418, "answered 418"),
        ("config.json", 401, "config.json: the Hub refuses the token (401)"),
        ("config.json", 403, "config.json: the Hub forbids it (403)"),
        ("config.json", 404, "config.json: the Hub lists the file but does not have it (404)"),
        (WEIGHTS_NAME, 500, "model.safetensors: the Hub is in trouble (500)"),
        (WEIGHTS_NAME, 503, "model.safetensors: the Hub is in trouble (503)"),
    ],
)
def test_a_status_is_one_sentence(hub, impatient, file, status, words):
    hub.commit(NAME, files())
    hub.fail(NAME, file, status)
    assert words in refusal(token=TOKEN)


def test_a_hub_that_is_down_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the client pauses"))
    hub.commit(NAME, files())
    hub.fail(NAME, "", 503)
    refusal()
    assert len(hub.requests) == 1


def test_an_error_that_the_caller_is_handling_is_not_taken_for_the_failure(hub):
    hub.commit(NAME, files())
    hub.fail(NAME, "", 503)
    try:
        raise PermissionError(13, "the caller's own")
    except PermissionError:
        assert "in trouble (503)" in refusal()
        assert "neither a file nor a Hub model" in refusal("a/b/c")


def test_a_refused_connection_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in refusal()


def test_a_password_in_the_address_of_the_hub_is_not_shown(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:1")
    assert "secret" not in refusal()


def test_a_host_that_is_not_known_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert "http://hub.invalid cannot be reached" in refusal()


def test_a_hub_that_does_not_answer_is_named(hub, monkeypatch):
    monkeypatch.setattr("model.hub._TIMEOUT", 0.1)
    hub.commit(NAME, files())
    hub.fail(NAME, "", "hang")
    assert "cannot be reached" in refusal()


@pytest.mark.parametrize("file", ["", "config.json"])
def test_an_endpoint_that_is_no_hub_is_named(hub, file):
    hub.commit(NAME, files())
    hub.fail(NAME, file, "blank")
    assert "check HF_ENDPOINT" in refusal()


def test_an_endpoint_without_a_scheme_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    assert "check HF_ENDPOINT" in refusal()


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_body_that_is_cut_off_is_named_and_not_kept(hub, impatient, kind):
    hub.commit(NAME, files())
    hub.fail(NAME, WEIGHTS_NAME, kind, methods=("GET",))
    line = refusal()
    assert WEIGHTS_NAME in line
    assert "try again" in line
    hub.repos[NAME].faults.clear()
    read_entries(fetch(NAME))


def test_a_body_that_is_cut_off_once_is_resumed(hub, impatient):
    hub.commit(NAME, files())
    hub.fail(NAME, WEIGHTS_NAME, "cut", times=1, methods=("GET",))
    assert read_entries(fetch(NAME)).keys() == tensors().keys()


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    hub.commit(NAME, files())
    (tmp_path / "file").touch()
    line = refusal(cache_dir=tmp_path / "file")
    assert "cannot be used: Not a directory" in line
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize(
    ("content", "words"), [(LFS_POINTER, "Git LFS pointer"), (WEB_PAGE, "web page"), (b"PK\x03\x04" * 9, "pickle")]
)
def test_what_came_in_place_of_the_weights_is_named_by_the_loader(hub, content, words):
    hub.commit(NAME, {**files(), WEIGHTS_NAME: content})
    folder = fetch(NAME)
    with pytest.raises(CheckpointError, match=words):
        read_entries(folder)


def test_a_client_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub is missing or too old: pip install" in refusal()


def test_progress_bars_can_be_switched_off_for_one_call(hub, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client's switch for bars where there is no terminal
    huggingface_hub.utils.enable_progress_bars()  # other tests switch transformers' bars off, and these with them
    hub.commit(NAME, files())
    fetch(NAME, progress=False)
    assert capsys.readouterr().err == ""
    hub.commit(NAME, {**files(), "config.json": b"{ }"})
    fetch(NAME, refresh=True)
    assert "config.json" in capsys.readouterr().err


# The environment, which the client reads once: each case is a process


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {**kept, "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


FETCH = f"from model.hub import fetch; print(fetch({NAME!r}))"


def test_importing_the_module_imports_neither_the_client_nor_torch():
    done = run("import sys, model.hub; print({'huggingface_hub', 'torch'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_endpoint_home_token_and_offline_mode_are_those_of_the_environment(hub, tmp_path):
    commit = hub.commit(NAME, files())
    hub.repos[NAME].token = TOKEN
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = run(FETCH, HF_ENDPOINT=hub.url, **home)
    assert done.stdout.strip() == str(tmp_path / "home/hub/models--owner--tiny/snapshots" / commit), done.stderr
    assert set(hub.authorizations) == {f"Bearer {TOKEN}"}
    hub.forget()
    again = run(FETCH, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", **home)
    assert again.stdout == done.stdout, again.stderr
    refused = run(FETCH, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "empty"))
    assert "and HF_HUB_OFFLINE forbids asking the Hub" in refused.stderr
    assert hub.requests == []


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_up_is_named(hub, tmp_path):
    hub.commit(NAME, {**files(), WEIGHTS_NAME: bytes(200_000)})
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    done = run(limit + FETCH, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    line = done.stderr.splitlines()[-1]
    assert f"{NAME}: {WEIGHTS_NAME}: the cache" in line
    assert "cannot be used: File too large" in line
