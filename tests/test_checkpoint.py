"""Headers, shards, names and the head of a checkpoint: what is read, dropped, or listed where it does not fit."""

import json
import os
import shutil
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from damage import CONFIG, DAMAGE, SHARDS, edit_config, make, pack, shard, tensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import model
from model import gpt2
from model.check import check
from model.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_entries, read_header
from model.errors import CheckpointError, LoadNotice
from model.load import BUNDLED, locate, plan
from model.names import map_names


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "tiny")


def parameters(source) -> dict[str, np.ndarray]:
    return dict(model.load(source, device="cpu", dtype="float32").parameters)


def assert_same(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    assert some.keys() == others.keys()
    for name, array in some.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def refusal(folder) -> list[str]:
    """The problems with which the headers are refused, in the one error that `check` and `load` share."""
    with pytest.raises(CheckpointError) as caught:
        model.load(folder, device="cpu")
    assert check(folder).problems == caught.value.problems
    return caught.value.problems


# --- headers and files


def test_a_header_says_what_the_safetensors_library_says():
    path = locate(BUNDLED) / WEIGHTS_NAME
    entries = {entry.name: entry for entry in read_header(path)}
    content = path.read_bytes()
    with safe_open(path, "np") as file:
        assert set(entries) == set(file.keys())
        for name, entry in entries.items():
            wanted = file.get_tensor(name)
            assert entry.dtype == "F16"
            assert entry.shape == wanted.shape
            assert content[entry.offset : entry.offset + entry.nbytes] == wanted.tobytes()


def test_padding_metadata_empty_tensors_and_any_order_of_the_header_are_fine(tmp_path):
    header = {
        "late": {"dtype": "I64", "shape": [2], "data_offsets": [4, 20]},
        "__metadata__": {"format": "pt"},
        "empty": {"dtype": "BF16", "shape": [3, 0], "data_offsets": [4, 4]},
        "early": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "half": {"dtype": "F4", "shape": [2], "data_offsets": [20, 21]},
    }
    path = tmp_path / "any.safetensors"
    path.write_bytes(pack(json.dumps(header).encode() + b"   ", bytes(21)))
    assert [entry.name for entry in read_header(path)] == ["early", "empty", "late", "half"]


def test_a_tensor_without_elements_fills_no_parameter(folder):
    save_file(tensors() | {"wpe.weight": np.zeros((0, 8), np.float32)}, folder / WEIGHTS_NAME)
    assert refusal(folder) == [f"{folder / WEIGHTS_NAME}: tensor wpe.weight is (0, 8), the config wants (16, 8)"]


@pytest.mark.parametrize(
    "kind",
    ["a header of 2**63 bytes", "a header over 100 MB", "a shape whose product overflows", "offsets past the end"],
)
def test_nothing_is_allocated_for_what_a_damaged_header_claims(folder, kind):
    DAMAGE[kind].do(folder)
    tracemalloc.start()
    assert check(folder).problems
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_nothing_is_allocated_for_sizes_that_only_the_config_claims(folder):
    edit_config(folder, vocab_size=2**24, n_positions=2**24, n_embd=2**17, n_inner=2**20)
    tracemalloc.start()
    problems = refusal(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any("wte.weight is (258, 8), the config wants (16777216, 131072)" in problem for problem in problems)
    assert peak < 1_000_000


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.safetensors"])
def test_the_only_safetensors_file_is_read_whatever_its_name(folder, name):
    before = parameters(folder)
    (folder / WEIGHTS_NAME).rename(folder / name)
    assert_same(parameters(folder), before)


def test_a_single_file_is_read_with_the_config_beside_it(folder):
    before = parameters(folder)
    (folder / WEIGHTS_NAME).rename(folder / "other.safetensors")
    (folder / WEIGHTS_NAME).write_bytes(b"")
    assert_same(parameters(folder / "other.safetensors"), before)


def test_a_pickle_beside_safetensors_is_not_touched(folder):
    before = parameters(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    assert_same(parameters(folder), before)


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path):
    for missing in (tmp_path / "no", f"{tmp_path}/no", f"{tmp_path}/no.safetensors"):
        with pytest.raises(CheckpointError, match="there is no such file or folder"):
            model.load(missing, device="cpu")


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "./" + "x" * 300, "~nobody-of-this-name/model"],
    ids=["a long name", "a long path", "a home of nobody"],
)
def test_a_path_that_cannot_be_is_refused_in_one_sentence(name):
    with pytest.raises(model.ModelError) as caught:
        model.load(name, device="cpu", local_files_only=True)
    assert len(caught.value.problems) == 1


def test_a_folder_with_an_adapter_alone_is_said_to_hold_no_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(CheckpointError, match="holds an adapter and no model: load the model that it is of"):
        model.load(folder, device="cpu")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"must be a folder or a \.safetensors file"):
        model.load(path, device="cpu")


# --- shards


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(folder):
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="read from several places, and this is a pipe"):
        model.load(folder, device="cpu")
    with pytest.raises(CheckpointError, match="must be a folder or a"):
        model.load(folder / WEIGHTS_NAME, device="cpu")
    assert "this is a pipe" in str(check(folder).problems)


def test_shards_load_as_the_single_file_does(folder):
    before = parameters(folder)
    shard(folder)
    assert_same(parameters(folder), before)
    assert check(folder).problems == []


def test_the_single_file_comes_before_an_index(folder, tmp_path):
    before = parameters(folder)
    other = shard(make(tmp_path / "other", weights=tensors(seed=1)))
    for file in (*SHARDS, INDEX_NAME):
        shutil.copy(other / file, folder)
    assert_same(parameters(folder), before)


def test_a_snapshot_in_the_hubs_cache_links_to_its_blobs(folder, tmp_path):
    before = parameters(folder)
    shard(folder)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert check(snapshot).problems == []
    assert_same(parameters(snapshot), before)


def test_all_shards_that_are_missing_damaged_or_refused_are_listed(folder):
    shard(folder)
    for file in SHARDS:
        (folder / file).write_bytes(b"")
    assert [problem.split(": ")[0] for problem in refusal(folder)] == [str(folder / file) for file in SHARDS]


# --- names


def test_bare_and_prefixed_names_load_alike(folder):
    before = parameters(folder)
    save_file({f"transformer.{name}": array for name, array in tensors().items()}, folder / WEIGHTS_NAME)
    assert check(folder).notices == []
    assert_same(parameters(folder), before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("inner", ["", "transformer."])
def test_the_prefixes_of_wrappers_are_removed_with_one_notice(folder, prefix, inner):
    before = parameters(folder)
    renamed = {f"{prefix}{inner}{name}": array for name, array in tensors().items()}
    save_file(renamed | {f"{prefix}lm_head.weight": tensors()["wte.weight"]}, folder / WEIGHTS_NAME)
    with pytest.warns(LoadNotice, match="prefix") as caught:
        assert_same(parameters(folder), before)
    assert len(caught) == 1
    assert all(part in str(caught[0].message) for part in prefix.rstrip(".").split("."))


def test_mask_buffers_are_dropped_and_biases_are_not(folder):
    before = parameters(folder)
    buffers = {}
    for layer in range(CONFIG.n_layer):
        buffers[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        buffers[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors() | buffers, folder / WEIGHTS_NAME)
    assert check(folder).notices == []
    assert_same(parameters(folder), before)
    np.testing.assert_array_equal(before["blocks.1.qkv.bias"], tensors()["h.1.attn.c_attn.bias"])
    stored = ["h.0.attn.bias", "transformer.h.11.attn.masked_bias", "h.0.attn.c_attn.bias"]
    names = map_names(stored, gpt2.PREFIX, gpt2.BUFFER)
    assert names.names == {"h.0.attn.c_attn.bias": "h.0.attn.c_attn.bias"}


@pytest.mark.parametrize(
    "name",
    ["h.0.attn.biases", "h.x.attn.bias", "attn.bias", "h.0.mlp.bias", "model.wte.weight", "transformers.wte.weight"],
)
def test_a_name_that_only_resembles_one_to_drop_or_strip_is_unexpected(folder, name):
    save_file(tensors() | {name: np.zeros(1, np.float32)}, folder / WEIGHTS_NAME)
    (problem,) = refusal(folder)
    assert f"tensor {name} (1,) is unexpected" in problem


def test_products_are_turned_and_nothing_else_is(folder):
    ours, theirs = parameters(folder), load_file(folder / WEIGHTS_NAME)
    slots = {slot.name: slot for slot in plan(folder).slots}
    for name, array in ours.items():
        stored = theirs[slots[name].source]
        product = name.endswith(("qkv.weight", "projection.weight", "up.weight", "down.weight"))
        np.testing.assert_array_equal(array, stored.T if product else stored, err_msg=name)


def test_all_missing_unexpected_and_wrong_tensors_are_in_one_error(tmp_path):
    config = model.GPT2Config(vocab_size=16, n_positions=4, n_embd=8, n_layer=5, n_head=2)
    every = tensors(config)
    missing = [name for name in every if name.startswith(("h.1.", "h.2.", "h.3."))]
    wrong = [name for name in every if name.endswith("c_fc.weight") and name not in missing]
    extra = [f"adapter.{number}.weight" for number in range(30)]
    kept = {name: array for name, array in every.items() if name not in missing}
    kept |= {name: np.zeros((2, 2), np.float32) for name in wrong + extra} | {"wpe.weight": every["wpe.weight"] > 0}
    problems = refusal(make(tmp_path / "tiny", config, kept))
    listed = "\n".join(problems)
    assert len(missing) == 36
    for name in missing:
        assert any(f"tensor {name} " in each and each.endswith(" is missing") for each in problems), name
    for name in extra:
        assert f"tensor {name} (2, 2) is unexpected" in listed
    for name in wrong:
        assert f"tensor {name} is (2, 2), the config wants (8, 32)" in listed
    assert "wpe.weight has the dtype BOOL" in listed


def test_config_and_weights_that_are_both_damaged_are_reported_together(folder):
    DAMAGE["seven bytes"].do(folder)
    DAMAGE["cross-attention"].do(folder)
    DAMAGE["a tokenizer cut off"].do(folder)
    DAMAGE["a generation config with text"].do(folder)
    files = [problem.removeprefix(f"{folder}/").split(":")[0] for problem in check(folder).problems]
    assert sorted(files) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_entries_name_the_shard_that_holds_them(folder):
    shard(folder)
    weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    assert {name: entry.path.name for name, entry in read_entries(folder).items()} == weight_map


# --- the output matrix


def with_head(folder: Path, head: np.ndarray | None, tie: bool) -> Path:
    make(folder, weights=tensors() if head is None else tensors() | {"lm_head.weight": head})
    return edit_config(folder, tie_word_embeddings=tie)


def test_a_tied_head_may_be_absent_or_equal(tmp_path):
    absent = model.load(with_head(tmp_path / "absent", None, True), device="cpu")
    equal = model.load(with_head(tmp_path / "equal", tensors()["wte.weight"], True), device="cpu")
    for lm in (absent, equal):
        assert "head.weight" not in lm.parameters
        assert lm.notices == []
    np.testing.assert_array_equal(absent.logits([1, 2]), equal.logits([1, 2]))


@pytest.mark.parametrize("chunk", [64, 2**20])
@pytest.mark.parametrize("changed", [None, 0, -1])
def test_a_tied_head_of_another_dtype_is_equal_where_its_values_are(tmp_path, monkeypatch, chunk, changed):
    """transformers ties them then: it compares what it has read."""
    monkeypatch.setattr(sys.modules["model.load"], "CHUNK", chunk)  # `model.load` is the function
    half = tensors()["wte.weight"].astype(np.float16)
    weights = tensors() | {"wte.weight": half.astype(np.float32), "lm_head.weight": half.copy()}
    if changed is not None:
        weights["lm_head.weight"].flat[changed] += 1
    folder = make(tmp_path / "model", weights=weights)
    with warnings.catch_warnings(action="ignore", category=LoadNotice):
        lm = model.load(folder, device="cpu")
    assert ("head.weight" in lm.parameters, len(lm.notices)) == ((False, 0) if changed is None else (True, 1))


def test_a_tied_head_stands_for_the_table_where_only_it_is_there(tmp_path):
    weights = tensors()
    make(tmp_path / "head", weights=weights | {"lm_head.weight": weights.pop("wte.weight")})
    lm = model.load(tmp_path / "head", device="cpu")
    assert "head.weight" not in lm.parameters
    assert lm.notices == []
    np.testing.assert_array_equal(lm.parameters["tokens.weight"], tensors()["wte.weight"])
    with pytest.raises(CheckpointError, match=r"tensor wte\.weight \(258, 8\) is missing"):
        model.load(edit_config(tmp_path / "head", tie_word_embeddings=False), device="cpu")


def test_a_tied_head_that_differs_is_used_with_a_notice(tmp_path):
    head = tensors()["wte.weight"].copy()
    head[-1, -1] += 1
    with pytest.warns(LoadNotice, match=r"lm_head\.weight differs"):
        lm = model.load(with_head(tmp_path / "other", head, True), device="cpu")
    tied = model.load(with_head(tmp_path / "tied", None, True), device="cpu")
    np.testing.assert_array_equal(lm.parameters["head.weight"], head)
    np.testing.assert_array_equal(lm.parameters["tokens.weight"], tied.parameters["tokens.weight"])
    changed = np.abs(lm.logits([1, 2]) - tied.logits([1, 2])).max(axis=(0, 1)) > 0
    assert changed.nonzero()[0].tolist() == [CONFIG.vocab_size - 1]


def test_a_head_of_its_own_is_used_without_a_notice(tmp_path):
    head = tensors(seed=1)["wte.weight"]
    lm = model.load(with_head(tmp_path / "own", head, False), device="cpu")
    np.testing.assert_array_equal(lm.parameters["head.weight"], head)
    assert lm.notices == []


def test_a_head_of_its_own_that_is_absent_is_missing(tmp_path):
    folder = with_head(tmp_path / "none", None, False)
    assert check(folder).problems == [f"{folder}: tensor lm_head.weight (258, 8) is missing"]


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    folder = with_head(tmp_path / "long", np.zeros((300, 8), np.float32), True)
    assert check(folder).problems == [
        f"{folder / WEIGHTS_NAME}: tensor lm_head.weight is (300, 8), the config wants (258, 8)"
    ]
