"""The config of a LLaMA or a Mistral: keys and defaults are those of transformers' `LlamaConfig` and `MistralConfig`.

The two are one architecture; Mistral has a sliding window, and other defaults.
"""

import functools
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from model.contract import (
    Contract,
    Rule,
    as_ids,
    epsilon,
    one_of,
    shown,
    size,
    switch,
    token_id,
    token_ids,
)
from model.errors import ConfigError
from model.rope import KEYS as ROPE_KEYS
from model.rope import Rope
from model.rope import read as read_rope

#: The only activation of the gate that `gpukernels.swiglu` has.
_ACTIVATIONS = {"silu": "silu", "swish": "silu"}

_MODELS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# What only the other of the two has.
_FOREIGN = {"llama": ("sliding_window",), "mistral": ("attention_bias", "mlp_bias")}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape and arithmetic of a LLaMA or a Mistral, in the names of its `config.json`.

    Raises ConfigError for what no `config.json` could say: another model_type, a LLaMA with a window, a Mistral with
    biases. `read`, and so `model.from_config`, judges the rest.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    rope: Rope = field(default_factory=Rope)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        if self.model_type not in _MODELS:
            raise ConfigError(f"model_type must be one of {', '.join(_MODELS)}, got {self.model_type!r}")
        if not isinstance(self.rope, Rope):
            raise ConfigError(f"rope must be a Rope, got {self.rope!r}")
        if foreign := [key for key in _FOREIGN[self.model_type] if getattr(self, key)]:
            raise ConfigError(f"a {self.model_type} has no {', '.join(foreign)}")

    # The names by which the runtime asks a config of any architecture.

    @property
    def n_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def n_embd(self) -> int:
        return self.hidden_size

    @property
    def n_layer(self) -> int:
        return self.num_hidden_layers

    @property
    def n_head(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return as_ids(self.eos_token_id)

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def feed_forward_width(self) -> int:
        return self.intermediate_size

    @property
    def attention_scale(self) -> float:
        """What the scores are multiplied by; `rope.scale` is of queries and keys both."""
        return self.rope.scale**2 / math.sqrt(self.head_width)

    @functools.cached_property
    def frequencies(self) -> np.ndarray | None:
        """(D / 2,) float32, or None: `gpukernels.rope` makes them from theta."""
        return self.rope.frequencies(self.head_width)

    def to_json(self) -> dict[str, Any]:
        """The config as transformers and vLLM read it: the older readers' keys of rotary positions, too."""
        values = asdict(self)
        rope = {key: value for key, value in values.pop("rope").items() if value is not None}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        # Some readers take null for a width.
        for key in (*_FOREIGN[self.model_type], *(["head_dim"] if self.head_dim is None else [])):
            del values[key]
        theta, kind = rope["rope_theta"], rope["rope_type"]
        scaling = None if kind == "default" else {key: value for key, value in rope.items() if key != "rope_theta"}
        values |= {"rope_parameters": rope, "rope_theta": theta, "rope_scaling": scaling}
        values["num_key_value_heads"] = self.kv_heads
        return {"architectures": [_MODELS[self.model_type]], **values}


_LLAMA_DEFAULTS = {key: value for key, value in asdict(LlamaConfig()).items() if key not in ("model_type", "rope")}
_LLAMA_RULES: dict[str, Rule] = {
    "vocab_size": size(2**24),
    "hidden_size": size(2**17),
    "intermediate_size": size(2**20),
    "num_hidden_layers": size(2**12),
    "num_attention_heads": size(2**12),
    "num_key_value_heads": size(2**12, optional=True),
    "head_dim": size(2**12, optional=True),
    "max_position_embeddings": size(2**26),
    "rms_norm_eps": epsilon,
    "hidden_act": one_of(_ACTIVATIONS),
    "attention_bias": switch,
    "mlp_bias": switch,
    "tie_word_embeddings": switch,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
}

# Read by `model.rope`, and by `_layer_types`.
_ELSEWHERE = (*ROPE_KEYS, "layer_types")
_CONTRACTS = {
    # pretraining_tp splits the same products; transformers does not look at it any more.
    "llama": Contract(
        _LLAMA_RULES, _LLAMA_DEFAULTS, inert=frozenset((*_ELSEWHERE, "attention_dropout", "pretraining_tp"))
    ),
    "mistral": Contract(
        {
            **{key: rule for key, rule in _LLAMA_RULES.items() if key not in _FOREIGN["mistral"]},
            "sliding_window": size(2**26, optional=True),
        },
        _LLAMA_DEFAULTS
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        inert=frozenset((*_ELSEWHERE, "attention_dropout")),
    ),
}


def read(values: dict[str, Any], name: str) -> tuple[LlamaConfig, list[str]]:
    """See `model.config.read_config`."""
    kind = values["model_type"]
    foreign = sorted({"n_embd", "n_head", "n_layer", "n_positions"} & values.keys())
    if foreign:
        raise ConfigError(f'{name}: model_type must be "gpt2" to go with {", ".join(foreign)}, got {shown(kind)}')
    fields, notices = _CONTRACTS[kind].read(values, name)
    rope, problems, unused = read_rope(values, fields["max_position_embeddings"], name)
    config = LlamaConfig(model_type=kind, rope=rope, **fields)
    if config.head_dim is None and config.hidden_size % config.n_head:
        problems.append(
            f"{name}: num_attention_heads={config.n_head} must divide hidden_size={config.hidden_size} without head_dim"
        )
    elif config.head_width % 2:
        problems.append(f"{name}: heads must be of an even width to be turned, got {config.head_width}")
    if config.n_head % config.kv_heads:
        problems.append(
            f"{name}: num_key_value_heads={config.kv_heads} must divide num_attention_heads={config.n_head}"
        )
    problems += _layer_types(values, config, name)
    if problems:
        raise ConfigError(problems)
    return config, notices + unused


def _layer_types(values: dict[str, Any], config: LlamaConfig, name: str) -> list[str]:
    """What is wrong with the kind of attention that each layer is said to have: here it is the same in all."""
    given = values.get("layer_types")
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    if given is None or given == [kind] * config.n_layer:
        return []
    wanted = f"{kind} for each of {config.n_layer} layers, as sliding_window is {shown(config.sliding_window)}"
    return [f"{name}: layer_types must be {wanted}; got {shown(given)}"]


#: Shapes of well-known models, as their own config.json has them.
PRESETS = {
    "llama-2-7b": LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=Rope(rope_theta=500000.0),
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "tinyllama-1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
    ),
    "mistral-7b": LlamaConfig(
        model_type="mistral",
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
}
