"""The pre-flight on every kind of damage: sentences, the same as `model.load`'s, and never another exception."""

import copy
import itertools
import json
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG, DAMAGE, edit_config, make, pack, shard

import model
from model.check import check
from model.checkpoint import WEIGHTS_NAME
from model.errors import LoadNotice, ModelError
from model.gpt2 import slots
from model.gpt2_config import PRESETS
from model.load import BUNDLED, locate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def folder(whole, tmp_path):
    """A model's folder of one's own, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_sentences_that_name_the_file_and_the_fault(folder, kind):
    damage = DAMAGE[kind]
    damage.do(folder)
    problems = check(folder).problems
    assert any(str(folder / damage.file) in problem and damage.says in problem for problem in problems)
    for problem in problems:
        assert str(folder) in problem
        assert problem.isprintable()
        assert len(problem) < 1000


@pytest.mark.parametrize("kind", DAMAGE)
def test_load_refuses_damage_in_the_words_of_check(folder, kind):
    DAMAGE[kind].do(folder)
    with pytest.raises(ModelError) as caught:
        model.load(folder, device="cpu")
    assert caught.value.problems == check(folder).problems


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS_NAME, "tokenizer.json", "."])
def test_what_may_not_be_read_is_said(folder, name):
    (folder / name).chmod(0)
    problems = check(folder).problems
    (folder / name).chmod(0o700)
    assert any("ermission denied" in problem for problem in problems)


@pytest.mark.parametrize("form", ["the bundled model", "a folder", "shards", "one file"])
def test_what_loads_has_no_problems(folder, form):
    source = {
        "the bundled model": lambda: locate(BUNDLED),
        "a folder": lambda: folder,
        "shards": lambda: shard(folder),
        "one file": lambda: folder / WEIGHTS_NAME,
    }[form]()
    report = check(source)
    assert report.problems == []
    assert report.notices == []
    assert report.plan.config == model.load(source, device="cpu").config
    assert report.tokenizer.encode("a") == model.load(source, device="cpu").tokenizer.encode("a")


def test_a_folder_without_a_tokenizer_has_a_notice_and_no_problem(folder):
    (folder / "tokenizer.json").unlink()
    report = check(folder)
    assert report.problems == []
    assert report.notices == [f"{folder}: no tokenizer: prompts can only be token ids"]
    assert model.load(folder, device="cpu").tokenizer is None


def test_a_tokenizer_with_more_ids_than_the_model_has_a_notice(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 258, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (notice,) = check(folder).notices
    assert "259 ids, the model only 258" in notice
    with pytest.warns(LoadNotice, match="259 ids"):
        model.load(folder, device="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_weights_are_read(tmp_path):
    """The largest preset in float32, 6.2 GB, as a file with a header and a hole."""
    config, header, end = PRESETS["gpt2-xl"], {}, 0
    for slot in slots(config):
        start, end = end, end + 4 * slot.size
        header[slot.source] = {"dtype": "F32", "shape": slot.stored_shape, "data_offsets": [start, end]}
    folder = make(tmp_path / "large", CONFIG)
    edit_config(folder, **config.to_json())
    raw = pack(header)
    (folder / WEIGHTS_NAME).write_bytes(raw)
    with open(folder / WEIGHTS_NAME, "ab") as file:
        file.truncate(len(raw) + end)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert check(folder).problems == []
    assert bytes_read() - before < 1_000_000


# --- mutations

_ODD = (None, True, 0, -1, 1, 2, 257, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
_ODD += ("", "a", "gpt2", "F16", "\0", "\ud800", "\n", "../x", "é" * 50, [], [0], [[]], {}, {"a": 1}, [1] * 100)
_KEYS = ("a", "\ud800", "x\n", "", "dtype", "__metadata__", "lm_head.weight", "h.0.attn.bias", "module.wte.weight")


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all that is inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


def mutate_json(raw: bytes, rng: random.Random) -> bytes:
    """Replaces, removes or renames something of a document."""
    document = json.loads(raw)
    *path, key = rng.choice(list(places(document)))
    parent = document
    for each in path:
        parent = parent[each]
    action = rng.random()
    if action < 0.2:
        del parent[key]
    elif action < 0.4 and isinstance(parent, dict):
        parent[rng.choice(_KEYS)] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(rng.choice(_ODD))
    return json.dumps(document).encode()


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, removes, repeats or inserts some bytes."""
    content, at, action = bytearray(raw), rng.randrange(len(raw)), rng.random()
    if action < 0.5:
        content[at] ^= 1 << rng.randrange(8)
    elif action < 0.6:
        del content[at:]
    elif action < 0.7:
        del content[at : at + rng.randrange(1, 9)]
    elif action < 0.8:
        content[at:at] = content[at : at + rng.randrange(1, 40)]
    else:
        content[at:at] = bytes(rng.choices(b'0123456789eE.-+[]{}",:\\nul \xff\0', k=rng.randrange(1, 5)))
    return bytes(content)


def mutate(path: Path, rng: random.Random) -> None:
    """Damages a file of a model at random: of weights mostly the header."""
    content, data = path.read_bytes(), b""
    change = mutate_json if path.suffix != ".txt" and rng.random() < 0.6 else mutate_bytes
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        if change is mutate_json:
            path.write_bytes(pack(mutate_json(content[8:end], rng), content[end:]))
            return
        if rng.random() < 0.9:
            content, data = content[:end], content[end:]
    path.write_bytes(change(content, rng) + data)


def forms(whole: Path, place: Path) -> list[Path]:
    """The same model as one file, as shards, and with GPT-2's own pair of tokenizer files."""
    single, shards, pair = (Path(shutil.copytree(whole, place / name)) for name in ("single", "shards", "pair"))
    (single / "generation_config.json").write_text('{"eos_token_id": [257, 3], "bos_token_id": 257}')
    shard(shards)
    (pair / "vocab.json").write_text(json.dumps(json.loads((pair / "tokenizer.json").read_text())["model"]["vocab"]))
    (pair / "merges.txt").write_text("#version: 0.2\na b\n")
    (pair / "tokenizer.json").unlink()
    return [single, shards, pair]


def test_no_random_damage_is_anything_but_a_model_error(whole, tmp_path):
    """Case by case for four seconds; the message names the case, which is the seed."""
    starts, folder = forms(whole, tmp_path), tmp_path / "damaged"
    assert [check(start).problems for start in starts] == [[], [], []]
    end, refused = time.monotonic() + 4, 0
    for case in itertools.count():
        if time.monotonic() > end:
            break
        rng = random.Random(case)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(starts), folder)
        mutate(rng.choice(sorted(folder.iterdir())), rng)
        try:
            report = check(folder)
        except BaseException as fault:
            raise AssertionError(f"case {case}: check raised {fault!r}") from fault
        try:
            with warnings.catch_warnings(action="ignore", category=LoadNotice):
                model.load(folder, device="cpu")
            problems = []
        except ModelError as fault:
            problems = fault.problems
        except BaseException as fault:
            raise AssertionError(f"case {case}: load raised {fault!r}") from fault
        assert problems == report.problems, f"case {case}"
        assert all(each.isprintable() for each in report.problems + report.notices), f"case {case}"
        refused += bool(problems)
    assert case > 100
    assert refused > case / 4
