"""GPT-2, LLaMA and Mistral against Hugging Face transformers: the same logits and tokens, from and to the same files.

`reference` says what agreeing means and where the checkpoints come from.
"""

import copy
import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONFIGS, NEW_TOKENS, PATHS, Judge, close, from_pretrained, read_config, read_weights
from safetensors import safe_open

import model
from model.decoder import Decoder

BUNDLED = "tiny-gpt2"
BUNDLED_FOLDER = Path(model.__file__).parent / "bundled" / BUNDLED

SAVED_LLAMAS = ("llama, llama3", "llama, tied", "mistral, window 7")

paths = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In models this small torch's threads only wait for one another, for longer than the work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """`judge(name)`: the judge of a configuration, on a checkpoint that transformers wrote."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def of(name: str) -> Judge:
        if name == BUNDLED:
            return Judge(BUNDLED_FOLDER, text=load(BUNDLED_FOLDER, "numpy").tokenizer.encode(reference.TEXT))
        folder = root / name.replace(" ", "-")
        reference.build(name).save_pretrained(folder)
        return Judge(folder)

    return of


def load(source, path: str, **options) -> model.LanguageModel:
    return model.load(source, device=PATHS[path], **options)


def check_logits(lm: model.LanguageModel, judge: Judge) -> None:
    for shape in judge.windows:
        expected = judge.expected(*shape)
        expected.check(lm.logits(expected.ids))


def check(lm: model.LanguageModel, judge: Judge) -> None:
    """The model agrees with the judge: logits of every window, and a greedy path."""
    check_logits(lm, judge)
    prompt, tokens = judge.greedy(9)
    assert lm.generate(prompt, max_new_tokens=len(tokens)).tokens == tokens


def decoder_of(lm: model.LanguageModel, *, rows: int) -> Decoder:
    """A decoder whose cache is NaN where nothing has been written."""
    decoder = Decoder(lm.parameters, lm.config, rows=rows, capacity=lm.config.n_positions)
    decoder.cache.keys[:] = decoder.cache.values[:] = float("nan")
    return decoder


def same_parameters(ours: model.LanguageModel, theirs: model.LanguageModel) -> None:
    assert list(ours.parameters) == list(theirs.parameters)
    for name, array in theirs.parameters.items():
        assert ours.parameters[name].dtype == array.dtype
        assert bool((ours.parameters[name] == array).all()), name


# The numbers


@pytest.mark.parametrize("name", reference.OVERLOOKED)
def test_the_table_of_configurations_would_show_a_key_that_is_overlooked(judge, name):
    expected = judge(name).expected(3, 80)
    other = Judge(judge(name).folder, weights=reference.build(name, **reference.OVERLOOKED[name])).run(expected.ids)
    # Nothing agrees with both.
    assert np.abs(expected.truth - other.truth).max() > 2 * expected.bound


@paths
@pytest.mark.parametrize("name", [*CONFIGS, BUNDLED])
def test_logits_are_transformers_at_every_position(judge, name, path):
    check_logits(load(judge(name).folder, path), judge(name))


@paths
@pytest.mark.parametrize("name", [name for name in [*CONFIGS, BUNDLED] if name != "1 position"])
def test_greedy_tokens_are_transformers(judge, name, path):
    prompt, tokens = judge(name).greedy(3 if name == "7 positions" else 9)
    result = load(judge(name).folder, path).generate(prompt, max_new_tokens=len(tokens))
    assert result.tokens == tokens
    assert len(tokens) == (4 if name == "7 positions" else NEW_TOKENS)
    assert result.finish_reason == "length"


@paths
@pytest.mark.parametrize("name", ["default", "unscaled by layer", "llama", "mistral, window 7", BUNDLED])
def test_prompts_of_several_lengths_get_the_tokens_that_each_gets_alone(judge, name, path):
    """Five prompts in three rows, so that two of them wait for rows that others leave."""
    prompts, wanted = zip(*(judge(name).greedy(length) for length in (16, 1, 9, 2, 5)), strict=True)
    results = load(judge(name).folder, path).generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=3)
    assert [result.tokens for result in results] == list(wanted)


@paths
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_row_ends_at_the_eos_ids_that_end_it_in_transformers(judge, tmp_path, path, place):
    prompts, (tokens, *_) = zip(*(judge("default").greedy(length) for length in (9, 5, 2)), strict=True)
    # The token that first comes latest in one path; another may have it sooner, or never.
    last = max(tokens, key=tokens.index)
    ending = copy.deepcopy(judge("default").float32)
    ending.config.eos_token_id = ending.generation_config.eos_token_id = [96, last]
    ending.save_pretrained(tmp_path)
    if place == "config.json":
        (tmp_path / "generation_config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(json.dumps({**read_config(tmp_path), "eos_token_id": 96}))
    theirs = [Judge(tmp_path).generate(prompt) for prompt in prompts]
    assert theirs[0] == tokens[: tokens.index(last) + 1]
    results = load(tmp_path, path).generate(prompts)
    assert [result.tokens for result in results] == theirs
    assert [result.finish_reason == "eos" for result in results] == [each[-1] in (96, last) for each in theirs]


# Files


@paths
@pytest.mark.parametrize("name", ["default", "untied odd"])
@pytest.mark.parametrize("write", reference.WRITERS)
def test_files_that_transformers_reads_are_read_alike(judge, tmp_path, name, write, path):
    write(judge(name).folder, tmp_path / "written")
    check(load(tmp_path / "written", path), Judge(tmp_path / "written"))


@paths
@pytest.mark.parametrize("prefix", ["module.transformer.", "_orig_mod.transformer.", "module._orig_mod."])
def test_the_prefixes_of_torch_wrappers_are_removed_with_a_notice(judge, tmp_path, prefix, path):
    reference.write_prefixed(judge("default").folder, tmp_path / "written", prefix)
    with pytest.warns(model.LoadNotice, match=prefix.split(".")[0]):
        lm = load(tmp_path / "written", path)
    check(lm, judge("default"))


@paths
@pytest.mark.parametrize("name", ["default", "untied odd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision_are_computed_in_float32(judge, tmp_path, name, dtype, path):
    copy.deepcopy(judge(name).float32).to(dtype).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_weights(tmp_path).values()} == {dtype}
    lm = load(tmp_path, path)
    assert lm.parameters.dtype == "float32"
    check(lm, Judge(tmp_path))


@pytest.fixture
def two_heads(judge, tmp_path):
    """A head that differs from the token table, under a config that says they are one."""
    weights = read_weights(judge("default").folder)
    head = weights["transformer.wte.weight"].flip(0).contiguous()
    return reference.rewrite(judge("default").folder, tmp_path / "two-heads", {**weights, "lm_head.weight": head})


@paths
def test_a_head_that_differs_from_a_tied_table_is_used_as_transformers_does(two_heads, path):
    theirs = Judge(two_heads)
    assert torch.equal(theirs.float32.lm_head.weight, read_weights(two_heads)["lm_head.weight"])
    with pytest.warns(model.LoadNotice, match=r"lm_head\.weight differs"):
        lm = load(two_heads, path)
    check(lm, theirs)


@paths
@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["dropout", "untied odd", "large matrices", *SAVED_LLAMAS, BUNDLED])
def test_transformers_and_we_read_what_save_writes(judge, tmp_path, name, single, path):
    lm, folder = load(judge(name).folder, path), tmp_path / "saved"
    for _ in range(2):  # over itself too
        lm.save(folder / "model.safetensors" if single else folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    before, saved = read_config(judge(name).folder), read_config(folder)
    assert {key: saved[key] for key in before} == before | {"dtype": "float32"}
    assert model.load(folder, device=PATHS[path]).config == lm.config
    reference.same_weights(from_pretrained(folder), judge(name).float32)
    expected = judge(name).expected(1, 40)
    expected.check(Judge(folder).run(expected.ids).theirs)
    same_parameters(load(folder, path), lm)


@paths
def test_a_head_of_its_own_is_saved_with_a_config_that_no_longer_ties_it(two_heads, tmp_path, path):
    with pytest.warns(model.LoadNotice, match="lm_head"):
        lm = load(two_heads, path)
    lm.save(tmp_path / "saved")
    assert read_config(tmp_path / "saved") == read_config(two_heads) | {"tie_word_embeddings": False}
    reference.same_weights(from_pretrained(tmp_path / "saved"), from_pretrained(two_heads))
    same_parameters(load(tmp_path / "saved", path), lm)


@pytest.mark.parametrize(("path", "dtype"), [("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16")])
def test_a_model_is_saved_in_the_dtype_it_has(judge, tmp_path, path, dtype):
    lm = load(judge("untied odd").folder, path, dtype=dtype)
    lm.save(tmp_path / "saved")
    saved = from_pretrained(tmp_path / "saved", dtype="auto")
    assert saved.dtype == getattr(torch, dtype)
    reference.same_weights(saved, copy.deepcopy(judge("untied odd").float32).to(saved.dtype))
    same_parameters(load(tmp_path / "saved", path, dtype=dtype), lm)


# Half precision


@pytest.mark.parametrize("name", ["default", "untied odd", "unscaled by layer", "large matrices", BUNDLED])
def test_float16_on_numpy_is_storage_of_half_the_size_for_float32_results(judge, name):
    rounded = copy.deepcopy(judge(name).float32).half().float()
    lm = load(judge(name).folder, "numpy", dtype="float16")
    assert 2 * lm.parameters.nbytes == load(judge(name).folder, "numpy").parameters.nbytes
    check(lm, Judge(judge(name).folder, weights=rounded))


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("name", ["default", "untied odd", "5 layers", BUNDLED])
def test_half_precision_on_torch_is_off_by_its_roundings(judge, name, dtype, unit):
    """What every op returns is rounded, by a relative error of at most `unit`; the rest is exact enough.

    On the way to a logit that happens to the sum of the tables; in each block to two norms, four products,
    attention, an activation, and two residual sums; at the end to a norm and the head. Errors of unrelated
    signs add up in squares, and layers that keep the size of what they get keep that of its error; the
    bound allows twice that.
    """
    rounded = copy.deepcopy(judge(name).float32).to(getattr(torch, dtype)).float()
    expected = Judge(judge(name).folder, weights=rounded).run(judge(name).draw(3, 40))
    logits = load(judge(name).folder, "torch", dtype=dtype).logits(expected.ids)
    roundings = 1 + 10 * judge(name).config.n_layer + 2
    close(logits, expected.truth, 2 * math.sqrt(roundings) * unit * np.abs(expected.truth).max())


# Decoding


@paths
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, 39)), warm=st.integers(0, 40))
def test_prefill_in_any_split_equals_step_by_step(judge, path, cuts, warm):
    """Also where the row held other tokens before, and what the cache never held is NaN."""
    expected, lm = judge("unscaled by layer").expected(3, 40), load(judge("unscaled by layer").folder, path)
    ids = expected.ids[2].tolist()
    decoder = decoder_of(lm, rows=2)
    if warm:
        decoder.prefill(1, expected.ids[0, :warm].tolist())
    for start, stop in itertools.pairwise([0, *sorted(cuts), 40]):
        logits = (decoder.extend if start else decoder.prefill)(1, ids[start:stop])
        close(lm.parameters.device.to_host(logits), expected.truth[2, None, stop - 1], expected.bound)


@paths
def test_rows_of_different_lengths_step_together_as_each_would_alone(judge, path):
    expected, lm = judge("unscaled by layer").expected(3, 40), load(judge("unscaled by layer").folder, path)
    decoder, rows, used = decoder_of(lm, rows=3), [0, 1, 2], [1, 13, 20]

    def agree(logits, rows):
        truth = np.stack([expected.truth[row, used[row] - 1] for row in rows])
        close(lm.parameters.device.to_host(logits), truth, expected.bound)

    for row in rows:
        agree(decoder.prefill(row, expected.ids[row, : used[row]].tolist()), [row])
    for step in range(20):
        if step == 10:
            decoder.move(2, 0)
            rows = [2, 1]
        logits = decoder.feed([int(expected.ids[row, used[row]]) for row in rows])
        used = [length + (row in rows) for row, length in enumerate(used)]
        agree(logits, rows)


@paths
def test_a_row_depends_on_no_other_row_and_on_no_later_token(judge, path):
    """Bit for bit where the shapes are the same; a matrix product may round otherwise in another shape."""
    expected, lm = judge("default").expected(3, 80), load(judge("default").folder, path)
    before, changed = lm.logits(expected.ids), expected.ids.copy()
    changed[[0, 2]] = 96 - changed[[0, 2]]
    changed[1, 50:] = 96 - changed[1, 50:]
    assert np.array_equal(lm.logits(changed)[1, :50], before[1, :50])
    close(lm.logits(expected.ids[1]), expected.truth[1:2], expected.bound)


# Without torch


def test_the_numpy_path_gives_its_tokens_without_importing_torch(judge):
    prompt, tokens = judge(BUNDLED).greedy(9)
    program = """if True:
        import json, sys, model
        lm = model.load("tiny-gpt2", device="cpu")
        lm.logits([1, 2, 3])
        tokens = lm.generate(json.loads(sys.argv[1])).tokens
        print(json.dumps([tokens, sorted({"torch", "transformers", "triton", "cupy"} & sys.modules.keys())]))
    """
    command = [sys.executable, "-c", program, json.dumps(prompt)]
    run = subprocess.run(command, cwd=Path(model.__file__).parents[1], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [tokens, []]
