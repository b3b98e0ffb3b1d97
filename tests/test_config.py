"""`config.json` as a contract: each key is honoured, inert, or refused by name, and an unknown one is said once."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import CONFIG, edit_config, make

import model
from model.check import check
from model.config import PRESETS, GPT2Config, generation_eos, read_config
from model.errors import ConfigError, LoadNotice
from model.memory import parameter_count

#: Of a GPT2LMHeadModel, by transformers' documentation.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

_NO_SIZE = (0, -1, 10**9, 1e9, "12", True, None, math.nan, math.inf, [12], {"n": 12})
_NO_SWITCH = (None, 0, 1, "true", [True], math.nan)
NOT_A_VALUE: dict[str, tuple] = {
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), _NO_SIZE),
    "n_inner": tuple(value for value in _NO_SIZE if value is not None),
    "activation_function": ("swiglu", "GELU", "", None, True, 1, ["gelu"], {"name": "gelu"}),
    "layer_norm_epsilon": (-1e-5, 1, 1e9, "1e-5", True, None, math.nan, math.inf, -math.inf, [1e-5]),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"), _NO_SWITCH),
    "bos_token_id": (-1, 0.5, "0", True, [0], math.nan),
    "eos_token_id": (-1, 0.5, "0", True, [0, "1"], [[0]], {"id": 0}, math.inf),
}

#: What asks for a model that is not computed here, and values of the same keys that do not.
REFUSED = {
    "add_cross_attention": (True, False),
    "is_encoder_decoder": (True, False),
    "cross_attention_hidden_size": (64, None),
    "tie_encoder_decoder": (True, False),
    "pruned_heads": ({"0": [1]}, {}),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, None),
    "is_causal": (False, True),
    "per_layer_config": ({"0": {"n_inner": 8}}, None),
    "transformers_weights": ("other.safetensors", None),
}

#: Keys that a GPT-2's config.json has and that cannot change its logits, with values that look as if they could.
INERT = {
    "attn_pdrop": 0.9,
    "embd_pdrop": 0.9,
    "resid_pdrop": 0.9,
    "initializer_range": 5.0,
    "n_ctx": 4,
    "use_cache": False,
    "reorder_and_upcast_attn": True,
    "gradient_checkpointing": True,
    "summary_activation": "tanh",
    "summary_first_dropout": 0.5,
    "summary_proj_to_labels": False,
    "summary_type": "mean",
    "summary_use_proj": False,
    "architectures": ["GPT2DoubleHeadsModel"],
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "transformers_version": "99.0",
    "_name_or_path": "https://example.com/other",
    "auto_map": {"AutoModel": "other/repo--modeling.Evil"},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "id2label": {"0": "a"},
    "pad_token_id": 3,
    "temperature": 9.0,
    "repetition_penalty": 9.0,
}


def config_of(**values) -> GPT2Config:
    return read_config({"model_type": "gpt2"} | values)[0]


def logits(folder: Path) -> np.ndarray:
    return model.load(folder, device="cpu", dtype="float32").logits([[5, 7, 5, 250, 1]])


def test_what_is_absent_has_transformers_default():
    config, notices = read_config({"model_type": "gpt2"})
    assert vars(config) == DEFAULTS
    assert notices == []


def test_the_defaults_are_those_of_the_installed_transformers():
    configuration = pytest.importorskip("transformers.models.gpt2.configuration_gpt2")
    theirs = configuration.GPT2Config().to_dict()
    assert {key: theirs[key] for key in DEFAULTS} == DEFAULTS


def test_all_keys_that_the_installed_transformers_writes_are_known():
    configuration = pytest.importorskip("transformers.models.gpt2.configuration_gpt2")
    config, notices = read_config(configuration.GPT2Config(n_layer=3, n_inner=64).to_dict())
    assert config == GPT2Config(n_layer=3, n_inner=64)
    assert notices == []


@pytest.mark.parametrize("key", NOT_A_VALUE)
def test_a_value_of_the_wrong_kind_or_size_is_refused_by_name(key):
    for value in NOT_A_VALUE[key]:
        with pytest.raises(ConfigError) as caught:
            read_config({"model_type": "gpt2", key: value}, "there/config.json")
        (problem,) = caught.value.problems
        assert problem.startswith(f"there/config.json: {key} must be ")
        assert problem.endswith(f"got {json.dumps(value)}")


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_computed_is_refused_by_name_where_it_is_on_and_accepted_where_it_is_off(key):
    on, off = REFUSED[key]
    with pytest.raises(ConfigError) as caught:
        config_of(**{key: on})
    (problem,) = caught.value.problems
    assert problem.startswith(f"config.json: {key}={json.dumps(on)} is refused: ")
    assert read_config({"model_type": "gpt2", key: off}) == (GPT2Config(), [])


@pytest.mark.parametrize("other", ["bert", "gpt_neo", "GPT2", "", None, 2, ["gpt2"]])
def test_another_model_type_is_refused(other):
    with pytest.raises(ConfigError, match='model_type must be one of "gpt2"'):
        read_config({"model_type": other, "n_layer": 2})


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(ConfigError, match="it is missing"):
        read_config({"n_layer": 2})


def test_every_problem_of_a_config_is_in_one_error():
    with pytest.raises(ConfigError) as caught:
        config_of(
            n_layer=0, n_head="12", activation_function="swiglu", add_cross_attention=True, hidden_size=64, n_embd=8
        )
    problems = caught.value.problems
    assert len(problems) == 5
    for key in ("n_layer", "n_head", "activation_function", "add_cross_attention", "hidden_size"):
        assert sum(f"config.json: {key}" in problem for problem in problems) == 1


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "n_positions"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ],
)
def test_the_common_names_of_sizes_mean_gpt2s_own(alias, key):
    assert config_of(**{alias: 24}) == config_of(**{key: 24}) == config_of(**{alias: 24, key: 24})
    assert getattr(config_of(**{alias: 24}), key) == 24
    with pytest.raises(ConfigError, match=f"{alias}=48 contradicts {key}=24"):
        config_of(**{alias: 48, key: 24})


@pytest.mark.parametrize(("heads", "width"), [(5, 768), (12, 8), (3, 8)])
def test_heads_must_divide_the_width(heads, width):
    with pytest.raises(ConfigError, match=f"n_head={heads} must divide n_embd={width}"):
        config_of(n_head=heads, n_embd=width)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 0.5),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_head", 4),
    ],
)
def test_an_honoured_key_changes_the_logits(tmp_path, key, value):
    folder = make(tmp_path / "tiny")
    before = logits(folder)
    after = logits(edit_config(folder, **{key: value}))
    assert np.abs(after - before).max() > 1e-6


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_inner", "n_embd"])
def test_a_size_that_does_not_fit_the_tensors_is_refused(tmp_path, key):
    folder = edit_config(make(tmp_path / "tiny"), **{key: 4})
    assert check(folder).problems


@pytest.mark.parametrize("key", INERT)
def test_an_inert_key_changes_nothing_and_is_not_mentioned(tmp_path, key):
    folder = make(tmp_path / "tiny")
    before = logits(folder)
    np.testing.assert_array_equal(logits(edit_config(folder, **{key: INERT[key]})), before)
    assert check(folder).notices == []


@pytest.mark.parametrize(
    ("names", "same"),
    [(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), True), (("silu", "swish"), True), (("gelu", "gelu_new"), False)],
)
def test_names_of_one_activation_agree_and_others_do_not(tmp_path, names, same):
    folder = make(tmp_path / "tiny")
    first, *others = (logits(edit_config(folder, activation_function=name)) for name in names)
    assert all(np.array_equal(first, other) for other in others) == same


def test_the_scale_of_attention_follows_both_of_its_keys():
    sizes = {"n_embd": 128, "n_head": 2}
    assert config_of(**sizes).attention_scale(3) == 1 / 8
    assert config_of(**sizes, scale_attn_weights=False).attention_scale(3) == 1
    assert config_of(**sizes, scale_attn_by_inverse_layer_idx=True).attention_scale(3) == 1 / 32


def test_the_feed_forward_is_four_times_as_wide_unless_it_is_given():
    assert config_of(n_embd=96).feed_forward_width == 384
    assert config_of(n_embd=96, n_inner=None).feed_forward_width == 384
    assert config_of(n_embd=96, n_inner=100).feed_forward_width == 100


def test_unknown_keys_are_said_once(tmp_path):
    folder = edit_config(make(tmp_path / "tiny"), zeta=1, alpha={"a": [1]})
    notice = f"{folder / 'config.json'}: unknown keys are not used: alpha, zeta"
    assert check(folder).notices == [notice]
    with pytest.warns(LoadNotice) as caught:
        lm = model.load(folder, device="cpu")
    assert [str(each.message) for each in caught] == lm.notices == [notice]


def test_a_notice_is_one_line_whatever_the_key_is(tmp_path):
    folder = edit_config(make(tmp_path / "tiny"), **{"a\nnote: b\x1b[2J\ud800": 1})
    (notice,) = check(folder).notices
    assert notice.isprintable()


def test_code_that_a_config_names_is_never_run(tmp_path):
    folder = make(tmp_path / "tiny")
    (folder / "modeling_mark.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    edit_config(
        folder,
        auto_map={"AutoConfig": "modeling_mark.Config", "AutoModelForCausalLM": "modeling_mark.Model"},
        architectures=["modeling_mark.Model"],
        _name_or_path=str(folder),
    )
    model.load(folder, device="cpu")
    assert not (tmp_path / "mark").exists()
    assert "modeling_mark" not in sys.modules


def test_a_config_read_back_is_the_config():
    config = GPT2Config(n_layer=3, n_inner=7, eos_token_id=(1, 2), bos_token_id=None, scale_attn_weights=False)
    assert read_config(json.loads(json.dumps(config.to_json()))) == (config, [])


@pytest.mark.parametrize(("given", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, ()), ([], ())])
def test_the_end_of_a_text_is_one_id_several_or_none(given, ids):
    assert config_of(eos_token_id=given).eos_token_ids == ids


@pytest.mark.parametrize(
    ("written", "ids"), [({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 0}, (0,)), ({}, None)]
)
def test_the_end_of_a_text_in_generation_config_comes_before_configs(tmp_path, written, ids):
    folder = make(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(json.dumps(written | {"temperature": 0.5}))
    assert generation_eos(folder) == ids
    assert model.load(folder, device="cpu").eos_token_ids == (CONFIG.eos_token_ids if ids is None else ids)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_a_preset_has_the_published_number_of_parameters(name, parameters):
    config = PRESETS[name]
    assert parameter_count(config) == parameters
    assert parameter_count(config, head=True) == parameters + 50257 * config.n_embd
