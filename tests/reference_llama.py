"""Random LLaMA and Mistral checkpoints written by transformers, for `reference` to judge."""

import math
import types
import zlib

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

_BASE = {
    "vocab_size": 97,
    "max_position_embeddings": 80,
    "hidden_size": 48,
    "intermediate_size": 83,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(kind: str, theta: float = 10000.0, **factors: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **factors}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

_YARN = {"original_max_position_embeddings": 20}
_ALL = {"factor": 8.0, "mscale": 2.0, "mscale_all_dim": 0.5, **_YARN}

#: Configurations by name: what differs from `_BASE`.
CONFIGS: dict[str, dict] = {
    "llama": {},
    "llama, no grouped heads": {"num_key_value_heads": 6},
    "llama, one key-value head": {"num_key_value_heads": 1},
    "llama, wide heads": {"head_dim": 20},
    "llama, narrow heads": {"head_dim": 2},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, biases of attention": {"attention_bias": True},
    "llama, biases of the MLP": {"mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, epsilon 1e-3": {"rms_norm_eps": 1e-3},
    "llama, theta 500": _rope("default", 500.0),
    "llama, linear": _rope("linear", factor=4.0),
    "llama, llama3": _rope("llama3", 5000.0, factor=8.0, **_LLAMA3),
    "llama, dynamic": _rope("dynamic", factor=4.0),
    "llama, yarn": _rope("yarn", 500.0, factor=4.0, **_YARN),
    "llama, yarn, sharpened": _rope("yarn", 500.0, factor=4.0, attention_factor=1.4, **_YARN),
    "llama, yarn, every key": _rope("yarn", 500.0, beta_fast=4.0, beta_slow=0.25, truncate=False, **_ALL),
    "mistral, yarn, window 7": {"sliding_window": 7, **_rope("yarn", 500.0, factor=4.0, **_YARN)},
    "llama, odd": {
        "vocab_size": 131,
        "hidden_size": 35,
        "intermediate_size": 37,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 6,
        "num_hidden_layers": 3,
    },
    "llama, 1 layer": {"num_hidden_layers": 1},
    "llama, 301 positions": {"max_position_embeddings": 301, "num_hidden_layers": 1},
    "mistral": {"sliding_window": None},
    "mistral, window 7": {"sliding_window": 7},
    "mistral, window 3": {"sliding_window": 3},
}

#: The nearest configuration with the same weights that a runtime which overlooked a key would compute.
OVERLOOKED: dict[str, dict] = {
    "llama, epsilon 1e-3": {"rms_norm_eps": 1e-6},
    "llama, theta 500": _rope("default"),
    "llama, linear": _rope("default"),
    "llama, llama3": _rope("default", 5000.0),
    "llama, yarn": _rope("yarn", 500.0, factor=4.0, attention_factor=1.0, **_YARN),
    "llama, yarn, sharpened": _rope("yarn", 500.0, factor=4.0, **_YARN),
    "llama, yarn, every key": _rope("yarn", 500.0, **_ALL),
    "mistral, yarn, window 7": {"sliding_window": 7, **_rope("linear", 500.0, factor=4.0)},
    "mistral, window 7": {"sliding_window": None},
    "mistral, window 3": {"sliding_window": None},
}


def build(name: str, **changes) -> transformers.PreTrainedModel:
    """As `reference.build`: scores and logits are a few units wide, and every norm and bias counts."""
    kind = transformers.MistralConfig if name.startswith("mistral") else transformers.LlamaConfig
    config = kind(**{**_BASE, **CONFIGS[name], **changes})
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    head = 1.5 / math.sqrt(config.hidden_size)
    # Small tokens: an epsilon shows only beside small means of squares.
    spreads = {"model.embed_tokens.weight": head if config.tie_word_embeddings else 0.06, "lm_head.weight": head}
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("norm" in key))
                continue
            spread = spreads.get(key, 1.5 / math.sqrt(parameter.shape[1]))
            onto_stream = "o_proj" in key or "down_proj" in key
            parameter.copy_(noise * spread / (math.sqrt(2 * config.num_hidden_layers) if onto_stream else 1))
    return built


def widen(model: torch.nn.Module) -> None:
    """Norms that cast to float32 stay in the float64 of the rest."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | MistralRMSNorm):
            module.forward = types.MethodType(forward, module)
