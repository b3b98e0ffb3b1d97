"""`config.json` as a contract: every key is honoured, inert, or refused by name.

A light runtime that skips a key it does not know computes another model without saying so. Here a key
is *honoured* (it changes the numbers and the code follows it), *inert* (it cannot change them), or
*refused*: the value asks for something that is not computed here. Unknown keys are reported.
Keys, defaults and aliases are those of transformers' `GPT2Config`.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import ConfigError, printable
from model.files import read_json

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

# Sizes beyond these are not of a GPT-2 on earth; the bound stands before anything is allocated.
_SIZES = {
    "vocab_size": 2**24,
    "n_positions": 2**24,
    "n_embd": 2**17,
    "n_layer": 2**12,
    "n_head": 2**12,
    "n_inner": 2**20,
}

# Keys that cannot change a logit here: training, other heads, bookkeeping, defaults of generation.
# fmt: off
_INERT = frozenset((
    # training, and heads that are not this one
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range", "gradient_checkpointing", "use_cache",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "problem_type", "num_labels", "id2label", "label2id", "finetuning_task", "task_specific_params",
    # bookkeeping, and what names code: none is ever run
    "architectures", "auto_map", "_name_or_path", "transformers_version", "tokenizer_class", "prefix",
    "dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "chunk_size_feed_forward", "is_decoder", "n_ctx",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    # asks for float32 scores, which every implementation here has anyway
    "reorder_and_upcast_attn",
    # defaults of generation, and ids that only transformers' own generate uses
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "bad_words_ids", "begin_suppress_tokens",
    "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty", "temperature", "top_k", "top_p",
    "typical_p", "max_length", "min_length", "num_return_sequences", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "remove_invalid_values",
))
# fmt: on

# Keys that must be off (False, None, or empty), and why.
_REFUSED = {
    "add_cross_attention": "cross-attention is not computed",
    "is_encoder_decoder": "only decoders are computed",
    "cross_attention_hidden_size": "cross-attention is not computed",
    "tie_encoder_decoder": "only decoders are computed",
    "pruned_heads": "pruned heads are not computed",
    "quantization_config": "quantized weights are not read",
}


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
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids

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


def generation_eos(folder: Path) -> tuple[int, ...] | None:
    """The eos ids of `generation_config.json`, which come before config.json's; None if it has none."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return None
    ids = read_json(path).get("eos_token_id")
    if ids is None:
        return None
    fault = _fault("eos_token_id", ids)
    if fault:
        raise ConfigError(f"{path}: eos_token_id must be {fault}, got {_json(ids)}")
    return tuple(ids) if isinstance(ids, list) else (ids,)


def read_config(values: dict[str, Any], name: str = "config.json") -> tuple[GPT2Config, list[str]]:
    """The config in the values of a `config.json`, and notices of the keys it does not know.

    Raises ConfigError with a sentence for every key that is refused or has a value of the wrong kind.
    """
    model_type = values.get("model_type")
    if model_type != "gpt2":
        got = "it is missing" if "model_type" not in values else f"got {_json(model_type)}"
        raise ConfigError(f'{name}: model_type must be "gpt2", the architecture computed here; {got}')

    problems: list[str] = []
    for key, why in _REFUSED.items():
        if values.get(key):
            problems.append(f"{name}: {key}={_json(values[key])} is refused: {why}")

    given, called = dict(values), {}
    for alias, key in ALIASES.items():
        if alias in given:
            value = given.pop(alias)
            if key not in given:
                called[key] = alias
            if given.setdefault(key, value) != value:
                problems.append(f"{name}: {alias}={_json(value)} contradicts {key}={_json(given[key])}")

    fields: dict[str, Any] = {}
    for key, default in asdict(GPT2Config()).items():
        value = given.get(key, default)
        fault = _fault(key, value)
        if fault:
            problems.append(f"{name}: {called.get(key, key)} must be {fault}, got {_json(value)}")
        fields[key] = tuple(value) if isinstance(value, list) else value
    if not problems and fields["n_embd"] % fields["n_head"]:
        problems.append(f"{name}: n_head={fields['n_head']} must divide n_embd={fields['n_embd']}")
    if problems:
        raise ConfigError(problems)

    fields["layer_norm_epsilon"] = float(fields["layer_norm_epsilon"])
    known = fields.keys() | _INERT | _REFUSED.keys() | {"model_type"}
    unknown = sorted(given.keys() - known)
    notices = [printable(f"{name}: unknown keys are not used: {', '.join(unknown)}")] if unknown else []
    return GPT2Config(**fields), notices


def _fault(key: str, value: Any) -> str | None:
    """What the value of an honoured key must be, if it is not."""
    if key in _SIZES:
        if key == "n_inner" and value is None:
            return None
        if not _is_int(value) or not 1 <= value <= _SIZES[key]:
            return f"an integer from 1 to {_SIZES[key]}"
    elif key == "activation_function":
        if not isinstance(value, str) or value not in ACTIVATIONS:
            return f"one of {', '.join(ACTIVATIONS)}"
    elif key == "layer_norm_epsilon":
        if not (_is_int(value) or isinstance(value, float)) or not 0 <= value < 1:
            return "a number from 0 to below 1"
    elif key == "bos_token_id":
        if value is not None and not (_is_int(value) and value >= 0):
            return "a token id or null"
    elif key == "eos_token_id":
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(_is_int(each) and each >= 0 for each in ids):
            return "a token id, a list of them, or null"
    elif not isinstance(value, bool):
        return "true or false"
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json(value: Any) -> str:
    """The value as the file has it."""
    return json.dumps(value, ensure_ascii=False, default=repr)
