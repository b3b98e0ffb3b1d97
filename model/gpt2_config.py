"""The config of a GPT-2: its keys, defaults and aliases are those of transformers' `GPT2Config`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from model.contract import Contract, as_ids, epsilon, one_of, size, switch, token_id, token_ids
from model.errors import ConfigError

#: transformers' names of activations -> those of `gpukernels.linear`.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

#: The common names that transformers maps to GPT-2's own.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# fmt: off
_INERT = frozenset((
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx",
    # heads that are not this one
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    # asks for float32 scores, which every implementation here has anyway
    "reorder_and_upcast_attn",
))
# fmt: on


@dataclass(frozen=True)
class GPT2Config:
    """The shape and arithmetic of a GPT-2, in the names of its `config.json`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return as_ids(self.eos_token_id)

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """What the scores of `layer` (from 0) are multiplied by."""
        scale = 1 / math.sqrt(self.head_width) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def to_json(self) -> dict[str, Any]:
        """The config as transformers and vLLM read it."""
        values = asdict(self)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **values}


#: The four sizes of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}

# Sizes beyond these are not of a GPT-2 on earth.
_CONTRACT = Contract(
    rules={
        "vocab_size": size(2**24),
        "n_positions": size(2**24),
        "n_embd": size(2**17),
        "n_layer": size(2**12),
        "n_head": size(2**12),
        "n_inner": size(2**20, optional=True),
        "activation_function": one_of(ACTIVATIONS),
        "layer_norm_epsilon": epsilon,
        "scale_attn_weights": switch,
        "scale_attn_by_inverse_layer_idx": switch,
        "tie_word_embeddings": switch,
        "bos_token_id": token_id,
        "eos_token_id": token_ids,
    },
    defaults=asdict(GPT2Config()),
    aliases=ALIASES,
    inert=_INERT,
)


def read(values: dict[str, Any], name: str) -> tuple[GPT2Config, list[str]]:
    """See `model.config.read_config`."""
    fields, notices = _CONTRACT.read(values, name)
    if fields["n_embd"] % fields["n_head"]:
        raise ConfigError(f"{name}: n_head={fields['n_head']} must divide n_embd={fields['n_embd']}")
    fields["layer_norm_epsilon"] = float(fields["layer_norm_epsilon"])
    return GPT2Config(**fields), notices
