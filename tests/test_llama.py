"""LLaMA and Mistral: the contract of their config.json, the names of their tensors, and what lies together."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import reference
import torch
from decoding import MISTRAL, replayed
from reference import PATHS, Judge, read_config, read_weights

import model
from model import llama
from model.config import PRESETS
from model.config import read_config as read
from model.errors import CheckpointError, ConfigError, ContextError, LoadNotice
from model.graph import GraphDecoder, captured_capacity
from model.memory import parameter_count, predict
from model.rope import Rope

paths = pytest.mark.parametrize("path", PATHS)

SMALL = dataclasses.replace(MISTRAL, model_type="llama", sliding_window=None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(name)`: the folder of a configuration that transformers wrote."""
    root, folders = tmp_path_factory.mktemp("checkpoints"), {}

    def of(name: str):
        if name not in folders:
            folders[name] = root / name.replace(" ", "-")
            reference.build(name).save_pretrained(folders[name])
        return folders[name]

    return of


# config.json


def test_the_defaults_are_transformers():
    import transformers

    for kind, theirs in (("llama", transformers.LlamaConfig()), ("mistral", transformers.MistralConfig())):
        config, notices = read({"model_type": kind})
        assert notices == []
        for field in dataclasses.fields(config):
            if field.name not in ("rope", "sliding_window", "attention_bias", "mlp_bias"):
                value = getattr(
                    config, {"num_key_value_heads": "kv_heads", "head_dim": "head_width"}.get(field.name, field.name)
                )
                assert value == getattr(theirs, field.name), field.name
        assert config.rope == Rope(**theirs.rope_parameters)
        assert config.sliding_window == getattr(theirs, "sliding_window", None)
        assert (config.attention_bias, config.mlp_bias) == (False, False)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama, llama3", "llama, linear", "llama, yarn, every key", "llama, biases", "mistral, window 7"],
)
def test_every_key_that_transformers_writes_is_known(written, name):
    config, notices = read(read_config(written(name)))
    assert notices == []
    assert read(config.to_json()) == (config, [])


WRONG = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act must be one of silu, swish"),
    ("llama", {"num_key_value_heads": 5}, "num_key_value_heads=5 must divide num_attention_heads=32"),
    (
        "llama",
        {"num_attention_heads": 30, "num_key_value_heads": 30},
        "num_attention_heads=30 must divide hidden_size=4096",
    ),
    ("llama", {"head_dim": 7}, "heads must be of an even width"),
    ("llama", {"hidden_size": 0}, "hidden_size must be an integer from 1"),
    ("llama", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps must be a number from 0 to below 1, got "1e-5"'),
    ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer from 1"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mistral", {"is_causal": None}, "is_causal=null is refused"),
    (
        "mistral",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types must be sliding_attention for each of 2 layers, as sliding_window is 4096; got",
    ),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "must be full_attention"),
    ("llama", {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "for each of 2 layers"),
    ("llama", {"n_embd": 64, "n_head": 2}, 'model_type must be "gpt2" to go with n_embd, n_head, got "llama"'),
]


@pytest.mark.parametrize(("kind", "values", "said"), WRONG)
def test_what_is_not_computed_is_refused_by_name(kind, values, said):
    with pytest.raises(ConfigError) as fault:
        read({"model_type": kind, **values})
    assert said in str(fault.value)


@pytest.mark.parametrize(
    ("kind", "window", "types"), [("llama", 64, "full"), ("mistral", None, "full"), ("mistral", 64, "sliding")]
)
def test_kinds_of_attention_that_are_those_of_the_window_are_not_mentioned(kind, window, types):
    values = {"model_type": kind, "num_hidden_layers": 3, "layer_types": [f"{types}_attention"] * 3}
    assert read(values | ({"sliding_window": window} if kind == "mistral" else {}))[1] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 50}, "num_attention_heads=6 must divide hidden_size=50 without head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ({"hidden_size": "48"}, 'hidden_size must be an integer from 1 to 131072, got "48"'),
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, got 'gemma'"),
        ({"rope": {"rope_theta": 5.0}}, "rope must be a Rope, got {'rope_theta': 5.0}"),
        # Each would be computed, and saved as another model.
        ({"sliding_window": 4}, "a llama has no sliding_window"),
        ({"model_type": "mistral", "mlp_bias": True, "attention_bias": True}, "a mistral has no attention_bias"),
    ],
)
def test_a_config_that_no_file_could_hold_is_refused(changes, said):
    with pytest.raises(ConfigError) as fault:
        model.from_config(dataclasses.replace(SMALL, **changes), device="cpu")
    assert said in str(fault.value)


def test_keys_that_only_the_other_of_the_two_has_are_said_once():
    assert "sliding_window" in read({"model_type": "llama", "sliding_window": 7})[1][0]
    config, (notice,) = read({"model_type": "mistral", "attention_bias": True})
    assert "attention_bias" in notice
    assert not config.attention_bias  # as transformers, whose Mistral has none


#: Parameters, by the papers and model cards: 6.74, 8.03, 1.24, 1.10 and 7.24 thousand millions.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_sizes_of_the_models_they_are_named_for(name):
    assert parameter_count(PRESETS[name]) == COUNTS[name]


# Files


@paths
@pytest.mark.parametrize("name", ["llama, tied", "llama, biases"])
def test_sharded_files_with_what_wrappers_and_old_versions_leave_are_read_alike(written, tmp_path, name, path):
    reference.write_sharded(written(name), tmp_path / "sharded")
    weights = read_weights(written(name))
    weights = {f"module.{key}": value for key, value in weights.items()}
    weights["module.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    reference.rewrite(written(name), tmp_path / "wrapped", weights)
    wanted = model.load(written(name), device=PATHS[path])
    with pytest.warns(LoadNotice, match="module"):
        wrapped = model.load(tmp_path / "wrapped", device=PATHS[path])
    for lm in (model.load(tmp_path / "sharded", device=PATHS[path]), wrapped):
        assert list(lm.parameters) == list(wanted.parameters)
        assert all(bool((lm.parameters[key] == array).all()) for key, array in wanted.parameters.items())


def test_a_tensor_that_is_missing_or_not_the_models_is_named(written, tmp_path):
    weights = read_weights(written("llama"))
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    del weights["model.layers.1.mlp.up_proj.weight"]
    reference.rewrite(written("llama"), tmp_path / "damaged", weights)
    with pytest.raises(CheckpointError) as fault:
        model.load(tmp_path / "damaged", device="cpu")
    assert "tensor layers.1.mlp.up_proj.weight (83, 48) is missing" in str(fault.value)
    assert "self_attn.q_proj.bias (48,) is unexpected: this model has no such parameter" in str(fault.value)


def test_a_mistrals_own_file_is_left_alone_and_by_itself_refused_in_one_sentence(written, tmp_path):
    reference.write_sharded(written("mistral"), tmp_path / "sharded")
    reference.rewrite(written("mistral"), tmp_path / "own", {"tok_embeddings.weight": torch.ones(2, 2)})
    own = (tmp_path / "own" / "model.safetensors").rename(tmp_path / "own" / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="a name of Meta's and Mistral's own files") as fault:
        model.load(tmp_path / "own", device="cpu")
    assert len(fault.value.problems) == 1
    own.rename(tmp_path / "sharded" / own.name)
    model.load(tmp_path / "sharded", device="cpu")


@paths
def test_a_head_that_differs_from_a_tied_table_is_used_as_transformers_does(written, tmp_path, path):
    weights = read_weights(written("llama, tied"))
    head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    folder = reference.rewrite(written("llama, tied"), tmp_path / "two", {**weights, "lm_head.weight": head})
    with pytest.warns(LoadNotice, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        lm = model.load(folder, device=PATHS[path])
    expected = Judge(folder).expected(3, 40)
    expected.check(lm.logits(expected.ids))


# Products of the same input


@paths
def test_what_is_multiplied_with_the_same_lies_together(path):
    """In sizes of which no parameter ends at a boundary of alignment."""
    config = dataclasses.replace(SMALL, hidden_size=35, num_attention_heads=5, num_key_value_heads=1, head_dim=6)
    lm = model.from_config(dataclasses.replace(config, attention_bias=True, mlp_bias=True), device=PATHS[path])
    for number, block in enumerate(lm.parameters.blocks):
        for joined, names in (("qkv", "qkv"), ("gate_up", ("gate", "up"))):
            for kind in ("weight", "bias"):
                parts = [lm.parameters[f"blocks.{number}.{name}.{kind}"] for name in names]
                rows = 0
                for part in parts:
                    part[...] = np.random.default_rng(rows).standard_normal() if path == "numpy" else float(rows)
                    assert bool((block[f"{joined}.{kind}"][rows : rows + len(part)] == part).all())
                    rows += len(part)
                assert len(block[f"{joined}.{kind}"]) == rows
    assert not any("gate_up" in name for name in lm.parameters)


@paths
def test_one_product_gives_what_several_give(path):
    lm = model.from_config(SMALL, seed=1, device=PATHS[path])
    device, apart = lm.parameters.device, copy.copy(lm.parameters)
    apart.blocks = [
        {name: array for name, array in block.items() if not name.startswith(("qkv", "gate_up"))}
        for block in lm.parameters.blocks
    ]
    ids = np.random.default_rng(0).integers(0, 61, (2, 30))
    ids, positions = device.indices(ids), device.indices(np.tile(np.arange(30), (2, 1)))
    together, separate = (
        device.to_host(llama.hidden_states(each, lm.config, ids, positions)) for each in (lm.parameters, apart)
    )
    # Sums of up to 80 terms in another order, twice a layer.
    assert np.abs(together - separate).max() <= 4 * 80**0.5 * 2.0**-24 * np.abs(together).max()


# Many positions


def test_a_row_may_have_fewer_tokens_than_the_model_has_positions(written):
    lm = model.load(written("llama"), device="cpu", context=12)
    with pytest.raises(ContextError, match="12"):
        lm.generate([1] * 13)
    assert len(lm.generate([1, 2, 3], max_new_tokens=None).tokens) == 9
    assert lm.config.n_positions == 80
    for context in (0, 81, "12", True):
        with pytest.raises(ContextError, match=r"context must be 1 to 80, the model's positions, got"):
            model.load(written("llama"), device="cpu", context=context)
    lm = model.load("tiny-gpt2", device="cpu", context=12)
    alone = lm.generate([1, 2, 3], max_new_tokens=20, overflow="slide")
    with lm.batch(2) as batch:
        entries = [batch.add([1, 2, 3], max_new_tokens=20, overflow="slide") for _ in range(3)]
        list(batch)
        assert batch._decoder.capacity == 12
    assert [entry.result.tokens for entry in entries] == [alone.tokens] * 3


def test_a_captured_cache_of_many_positions_has_room_for_what_is_asked():
    assert [captured_capacity(tokens, 1024) for tokens in (1, 1000, 1024)] == [1024] * 3
    wanted = {1: 8192, 8192: 8192, 8193: 16384, 100_000: 131_072, 131_000: 131_072}
    assert {tokens: captured_capacity(tokens, 131_072) for tokens in wanted} == wanted
    assert captured_capacity(9000, 10_000) == 10_000
    config = PRESETS["llama-3.2-1b"]
    for tokens, room in ((100, 8192), (10_000, 16_384)):
        ledger = predict(config, "float16", "cuda", context=tokens)
        assert ledger.kv_cache == 2 * config.n_layer * room * 8 * 64 * 2
    assert predict(config, "float16", "cuda", context=100, positions=5000).kv_cache == 2 * 16 * 5000 * 8 * 64 * 2


def test_a_longer_question_gets_a_larger_captured_cache(monkeypatch):
    """Without CUDA: the decoder that is kept serves what fits it, and no more."""
    lm = model.from_config(dataclasses.replace(SMALL, max_position_embeddings=40), device="cpu")
    made = []

    class Kept(GraphDecoder):
        def __init__(self, *args, **options):
            made.append(options["capacity"])
            super().__init__(*args, **options, capture=replayed)

    monkeypatch.setattr("model.graph._ALWAYS", 8)
    monkeypatch.setattr("model.language_model.can_capture", lambda parameters, config: True)
    monkeypatch.setattr("model.language_model.graph_decoder", lambda parameters, config: Kept)
    for prompt, new in ((2, 3), (5, 3), (6, 4), (4, 4), (20, 9)):
        lm.generate([1] * prompt, max_new_tokens=new)
    assert made == [8, 16, 32]


def test_a_model_of_a_config_is_saved_for_transformers(tmp_path):
    rope = Rope(5000.0, "llama3", 8.0, 1.0, 4.0, 16)
    lm = model.from_config(dataclasses.replace(SMALL, rope=rope, eos_token_id=(3, 5)), seed=2, device="cpu")
    lm.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [3, 5]
    expected = Judge(tmp_path).expected(2, 40)
    expected.check(lm.logits(expected.ids))
    assert model.load(tmp_path, device="cpu").config.to_json() == lm.config.to_json()
