"""What `model.hub.fetch` downloads, keeps and finds again: the real client against a Hub on this machine."""

import os
import threading
from pathlib import Path

import pytest
from hub_model import NAME, NEEDED, files, huggingface_hub, offline, refusal, tensors

from model.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_entries
from model.hub import fetch

# What is downloaded


def test_one_file_of_weights_and_only_what_a_model_needs_are_downloaded(hub):
    commit = hub.commit(NAME, files())
    folder = fetch(NAME)
    assert folder.name == commit
    assert {path.name for path in folder.iterdir()} == NEEDED | {WEIGHTS_NAME} == hub.downloads()
    assert read_entries(folder).keys() == tensors().keys()


def test_the_index_and_every_shard_it_names_are_downloaded(hub):
    hub.commit(NAME, files(shards=3))
    folder = fetch(NAME)
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert {path.name for path in folder.iterdir()} == NEEDED | shards | {INDEX_NAME} == hub.downloads()
    assert read_entries(folder).keys() == tensors().keys()


def test_one_file_is_preferred_to_shards(hub):
    hub.commit(NAME, files(shards=2) | files())
    fetch(NAME)
    assert hub.downloads() == NEEDED | {WEIGHTS_NAME}


def test_snapshots_link_to_blobs_and_read_entries_reads_through_the_links(hub):
    hub.commit(NAME, files(shards=2))
    folder = fetch(NAME)
    links = [path for path in folder.iterdir() if path.is_symlink()]
    if os.name != "nt":
        assert len(links) == len(list(folder.iterdir()))
    assert all(os.readlink(path).startswith("../../blobs/") for path in links)
    assert read_entries(folder).keys() == tensors().keys()


def test_a_model_that_was_renamed_is_found_under_its_old_name(hub):
    commit = hub.commit("openai-community/gpt2", files())
    hub.renamed["gpt2"] = "openai-community/gpt2"
    assert fetch("gpt2").name == commit
    hub.forget()
    assert fetch("gpt2").name == commit
    assert hub.requests == []


def test_two_threads_fetch_the_same_model(hub):
    commit = hub.commit(NAME, files(shards=2))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(fetch(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder.name for folder in folders] == [commit, commit]
    assert read_entries(folders[0]).keys() == tensors().keys()


def test_sentencepiece_comes_where_there_is_no_other_tokenizer(hub):
    for tokenizer in (True, False):
        hub.commit(NAME, files(tokenizer=tokenizer) | {"tokenizer.model": b"\n\x0e"})
        hub.forget()
        assert (fetch(NAME, refresh=True) / "tokenizer.model").is_file() is not tokenizer


# The cache


@pytest.mark.parametrize("options", [{"shards": 1}, {"shards": 2}, {"tokenizer": False}])
def test_the_second_fetch_makes_no_request(hub, options):
    hub.commit(NAME, files(**options))
    first = fetch(NAME)
    hub.forget()
    assert fetch(NAME) == first
    assert hub.requests == []


def test_the_client_finds_in_the_cache_what_fetch_wrote(hub):
    hub.commit(NAME, files(tokenizer=False), branch="refs/pr/1")
    folder = fetch(NAME, revision="refs/pr/1")
    hub.forget()
    found = huggingface_hub.snapshot_download(NAME, revision="refs/pr/1", local_files_only=True)
    assert Path(found) == folder
    absent = huggingface_hub.try_to_load_from_cache(NAME, "tokenizer.json", revision="refs/pr/1")
    assert absent is huggingface_hub._CACHED_NO_EXIST
    assert hub.requests == []


def test_fetch_finds_in_the_cache_what_the_client_wrote(hub):
    hub.commit(NAME, files())
    folder = huggingface_hub.snapshot_download(NAME)
    hub.forget()
    assert fetch(NAME) == Path(folder)
    assert hub.requests == []


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00003.safetensors", INDEX_NAME, "tokenizer.json"])
def test_a_snapshot_that_was_interrupted_is_completed_and_nothing_comes_twice(hub, lost):
    content = files(shards=3)
    del content["vocab.json"]
    hub.commit(NAME, content)
    folder = fetch(NAME)
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    hub.forget()
    if lost != "tokenizer.json":
        named = WEIGHTS_NAME if lost == INDEX_NAME else lost
        assert named in refusal(local_files_only=True)
    assert hub.requests == []
    assert fetch(NAME) == folder
    assert hub.downloads() == {lost}
    assert read_entries(folder).keys() == tensors().keys()


def test_a_download_that_breaks_off_leaves_no_snapshot_that_looks_whole(hub):
    hub.commit(NAME, files(shards=2))
    hub.fail(NAME, "model-00002-of-00002.safetensors", 403)
    assert "model-00002-of-00002.safetensors" in refusal()
    assert "lacks" in refusal(local_files_only=True)
    hub.repos[NAME].faults.clear()
    hub.forget()
    read_entries(fetch(NAME))
    assert hub.downloads() == {"model-00002-of-00002.safetensors"}


def test_weights_that_another_program_cached_are_completed_with_the_tokenizer(hub):
    hub.commit(NAME, files())
    for file in ("config.json", WEIGHTS_NAME):
        huggingface_hub.hf_hub_download(NAME, file)
    hub.forget()
    assert fetch(NAME, local_files_only=True).is_dir()  # weights are enough where no more can be had
    assert hub.requests == []
    assert (fetch(NAME) / "tokenizer.json").is_file()


def test_a_cache_elsewhere_is_used(hub, tmp_path):
    hub.commit(NAME, files())
    folder = fetch(NAME, cache_dir=tmp_path / "elsewhere")
    assert folder.is_relative_to(tmp_path / "elsewhere")
    hub.forget()
    assert fetch(NAME, cache_dir=str(tmp_path / "elsewhere")) == folder
    assert hub.requests == []
    assert "lacks" in refusal(local_files_only=True)


# Offline


def test_offline_the_cache_is_enough(hub, monkeypatch):
    hub.commit(NAME, files())
    folder = fetch(NAME)
    hub.forget()
    offline(monkeypatch)
    assert fetch(NAME) == fetch(NAME, local_files_only=True) == folder
    assert hub.requests == []


def test_offline_what_is_not_cached_is_named(hub, monkeypatch):
    hub.commit(NAME, files())
    assert "lacks config.json, model.safetensors, and local_files_only forbids asking the Hub" in refusal(
        local_files_only=True
    )
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE" in refusal()
    assert "refresh was asked for" in refusal(refresh=True)
    assert hub.requests == []


# Revisions


def test_a_branch_a_tag_and_a_commit_are_each_fetched_once(hub):
    commits = {name: hub.commit(NAME, files(), branch=name) for name in ("main", "v1.0", "feature/short")}
    commits |= {commit: commit for commit in commits.values()}
    for revision, commit in commits.items():
        assert fetch(NAME, revision=revision).name == commit
    hub.forget()
    for revision, commit in commits.items():
        assert fetch(NAME, revision=revision).name == commit
    assert hub.requests == []


def test_a_commit_that_was_never_a_branch_is_remembered(hub):
    commit = hub.commit(NAME, files())
    hub.commit(NAME, files())
    assert fetch(NAME, revision=commit).name == commit
    hub.forget()
    assert fetch(NAME, revision=commit, local_files_only=True).name == commit
    assert "lacks" in refusal(local_files_only=True)


def test_a_branch_that_moved_is_seen_with_refresh_only(hub):
    old = hub.commit(NAME, files())
    fetch(NAME)
    new = hub.commit(NAME, files(shards=2))
    assert fetch(NAME).name == old
    assert fetch(NAME, refresh=True).name == new
    assert fetch(NAME).name == new


def test_a_branch_that_moves_during_the_download_does_not_mix_commits(hub, monkeypatch):
    old = hub.commit(NAME, files(shards=2))
    download = huggingface_hub.hf_hub_download

    def move(*args, **kwargs):
        path = download(*args, **kwargs)
        hub.commit(NAME, files(shards=3))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", move)
    assert fetch(NAME).name == old
    hub.forget()
    assert read_entries(fetch(NAME)).keys() == tensors().keys()
    assert hub.requests == []


def test_the_old_commit_stays_usable_while_its_successor_cannot_be_had(hub):
    old = hub.commit(NAME, files())
    fetch(NAME)
    hub.commit(NAME, {**files(), WEIGHTS_NAME: files()[WEIGHTS_NAME] + b"new"})
    hub.fail(NAME, WEIGHTS_NAME, 403)
    assert WEIGHTS_NAME in refusal(refresh=True)
    assert fetch(NAME, local_files_only=True).name == old


def test_a_refresh_that_finds_no_hub_is_an_error(hub):
    hub.commit(NAME, files())
    fetch(NAME)
    hub.fail(NAME, "", 503)
    assert "503" in refusal(refresh=True)


@pytest.mark.parametrize("revision", ["", "../../elsewhere", "/etc", "a b", "main\n", "a\\b", "C:x"])
def test_a_revision_that_git_could_not_have_is_refused(hub, revision):
    assert "cannot be a branch, tag or commit" in refusal(revision=revision)
    assert hub.requests == []
