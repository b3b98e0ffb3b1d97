"""Rotary positions of a config.json: which are read, what is refused, and the frequencies that they come to."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from decoding import MISTRAL

from model import llama
from model.config import read_config
from model.errors import ConfigError
from model.rope import Rope


def read(values):
    """The config of a LLaMA, and notices."""
    return read_config({"model_type": "llama", **values})


OLD = [
    ({"rope_theta": 500.0}, Rope(500.0)),
    ({"rope_theta": 500.0, "rope_scaling": None}, Rope(500.0)),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(10000.0, "linear", 4)),
    ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, Rope(7.0, "linear", 2.0)),
    ({"rope_parameters": {"rope_theta": 9.0}, "rope_theta": 8.0}, Rope(9.0)),
    (
        {"rope_parameters": {"rope_theta": 9.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        Rope(1e4, "linear", 2.0),
    ),
]


@pytest.mark.parametrize(("values", "rope"), OLD)
def test_older_configs_are_read_as_transformers_reads_them(values, rope):
    import transformers

    assert read(values)[0].rope == rope
    theirs = transformers.LlamaConfig(**copy.deepcopy(values)).rope_parameters
    assert {key: theirs[key] for key in ("rope_theta", "rope_type")} == {
        "rope_theta": rope.rope_theta,
        "rope_type": rope.rope_type,
    }
    assert theirs.get("factor") == rope.factor


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 24}])
@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 48}])
def test_the_original_context_is_the_one_that_transformers_takes(rope, beside, inside):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = {"max_position_embeddings": 96, "rope_scaling": rope | inside, **beside}
    config = transformers.LlamaConfig(**copy.deepcopy(values))
    LlamaRotaryEmbedding(config)  # what stands beside is looked at late
    theirs = config.rope_parameters["original_max_position_embeddings"]
    assert read(values)[0].rope.original_max_position_embeddings == theirs


WRONG = [
    (
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "rope_type of rope_scaling must be one of default, linear, dynamic, llama3, yarn",
    ),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, 'got "longrope"'),
    (
        {"rope_parameters": YARN | {"beta_fast": -1}},
        "beta_fast of yarn rotary positions must be a number from 0",
    ),
    (
        {"rope_parameters": YARN | {"truncate": None}},
        "truncate of yarn rotary positions must be true or false",
    ),
    ({"rope_parameters": YARN | {"attention_factor": 0}}, "attention_factor of yarn rotary positions must be"),
    ({"rope_parameters": YARN, "rope_theta": 1}, "rope_theta of yarn rotary positions must not be 1"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object or null"),
    ({"rope_theta": 0}, "rope_theta of default rotary positions must be a number above 0, got 0"),
    ({"rope_theta": math.inf}, "rope_theta of default rotary positions"),
    ({"rope_theta": 10**400}, "rope_theta of default rotary positions must be a number above 0, got 1000"),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}},
        "original_max_position_embeddings of llama3 rotary positions must be a whole number above 0, got 1000",
    ),
    (
        {"rope_scaling": {"type": "linear"}},
        "factor of linear rotary positions must be a number above 0, got nothing",
    ),
    (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 0.5},
        "original_max_position_embeddings of llama3 rotary positions must be a whole number",
    ),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192, "low_freq_factor": 4.0}},
        "high_freq_factor must be more than low_freq_factor=4.0, got 4.0",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is refused"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_what_is_not_computed_is_refused_by_name(values, said):
    with pytest.raises(ConfigError) as fault:
        read(values)
    assert said in str(fault.value)


@pytest.mark.parametrize(
    ("key", "value", "unused"),
    [
        ("rope_parameters", {"rope_type": "default", "factor": 8.0}, "default rotary positions do not use: factor"),
        (
            "rope_scaling",
            {"type": "linear", "factor": 2.0, "mscale": 1.0},
            "linear rotary positions do not use: mscale",
        ),
        ("rope_parameters", {"full_attention": {"rope_type": "linear"}}, "not use: full_attention"),
    ],
    ids=str,
)
def test_keys_that_go_unused_are_said_once(key, value, unused):
    (notice,) = read({key: value})[1]
    assert notice.startswith(f"config.json: keys of {key} that ")
    assert notice.endswith(unused)


@pytest.mark.parametrize(
    "name", ["llama, llama3", "llama, linear", "llama, yarn", "llama, yarn, sharpened", "llama, yarn, every key"]
)
def test_frequencies_are_transformers_to_the_last_bits(name):
    theirs = reference.build(name).model.rotary_emb
    config = read(theirs.config.to_dict())[0]
    assert config.frequencies.dtype == np.float32
    # Two values are blended, each of four operations, each rounded once: and the weights of the two.
    np.testing.assert_allclose(config.frequencies, theirs.inv_freq.numpy(), rtol=8 * 2.0**-24)
    assert config.rope.scale == pytest.approx(theirs.attention_scaling, rel=1e-15)


def test_a_zero_is_no_weight_for_yarn_as_for_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = YARN | {"rope_theta": 1e4, "mscale": 2.0, "mscale_all_dim": 0, "beta_fast": 0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=dict(values)))
    config = read({"rope_parameters": values})[0]
    assert config.rope.scale == theirs.attention_scaling != 1
    np.testing.assert_allclose(config.frequencies, theirs.inv_freq.numpy(), rtol=8 * 2.0**-24)


def test_frequencies_stay_where_a_captured_graph_reads_them():
    """However many others are asked for meanwhile; and a config may have a list, which has no hash."""
    rope, ids = Rope(5000.0, "llama3", 8.0, 1.0, 4.0, 16), torch.zeros(1, 2)
    config = dataclasses.replace(MISTRAL, rope=rope, eos_token_id=[3, 5])
    first = llama._frequencies(config, ids)
    for factor in range(2, 40):
        llama._frequencies(dataclasses.replace(config, rope=Rope(5000.0, "linear", factor)), ids)
    assert llama._frequencies(config, ids) is first
