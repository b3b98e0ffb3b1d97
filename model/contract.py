"""`config.json` as a contract: every key is honoured, inert, or refused by name.

A light runtime that skips a key it does not know computes another model without saying so. Here a key
is *honoured* (it changes the numbers and the code follows it), *inert* (it cannot change them), or
*refused*: the value asks for something that is not computed here. Unknown keys are reported. An architecture
says which keys are which: `model.gpt2_config`, `model.llama_config`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.errors import ConfigError, printable

#: What the value of a key must be, in words, if it is not that; else None.
Rule = Callable[[Any], str | None]

# Keys that cannot change a logit of any model here: training, bookkeeping, defaults of generation.
# fmt: off
_INERT = frozenset((
    # training
    "initializer_range", "gradient_checkpointing", "use_cache",
    "problem_type", "num_labels", "id2label", "label2id", "finetuning_task", "task_specific_params",
    # bookkeeping, and what names code: none is ever run
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "tokenizer_class", "prefix",
    "dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "chunk_size_feed_forward", "is_decoder",
    "is_causal",  # true, or `read` refuses it
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
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
    "per_layer_config": "all layers are alike here",
    "transformers_weights": "weights are read by their usual names",
}


@dataclass(frozen=True)
class Contract:
    """Which keys of an architecture's `config.json` are honoured, and which cannot matter.

    Attributes:
        rules: of each honoured key what its value must be.
        defaults: of each honoured key, as transformers has them.
        aliases: other names of honoured keys.
        inert: the architecture's own keys that cannot change a logit.
    """

    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()

    def read(self, values: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
        """The honoured keys' values, lists as tuples, and notices of the keys that are not known.

        Raises ConfigError with a sentence for every key that is refused or has a value of the wrong kind.
        """
        problems = [
            f"{name}: {key}={shown(values[key])} is refused: {why}" for key, why in _REFUSED.items() if values.get(key)
        ]
        if not values.get("is_causal", True):
            problems.append(f"{name}: is_causal={shown(values['is_causal'])} is refused: a token never sees later ones")
        given, called = dict(values), {}
        for alias, key in self.aliases.items():
            if alias in given:
                value = given.pop(alias)
                if key not in given:
                    called[key] = alias
                if given.setdefault(key, value) != value:
                    problems.append(f"{name}: {alias}={shown(value)} contradicts {key}={shown(given[key])}")
        fields = {}
        for key, rule in self.rules.items():
            value = given.get(key, self.defaults[key])
            wanted = rule(value)
            if wanted:
                problems.append(f"{name}: {called.get(key, key)} must be {wanted}, got {shown(value)}")
            fields[key] = tuple(value) if isinstance(value, list) else value
        if problems:
            raise ConfigError(problems)
        unknown = sorted(given.keys() - self.rules.keys() - _INERT - _REFUSED.keys() - self.inert)
        notices = [printable(f"{name}: unknown keys are not used: {', '.join(unknown)}")] if unknown else []
        return fields, notices


def size(most: int, *, optional: bool = False) -> Rule:
    """An integer from 1; a bound stands before anything is allocated."""

    def rule(value: Any) -> str | None:
        if (optional and value is None) or (is_int(value) and 1 <= value <= most):
            return None
        return f"an integer from 1 to {most}"

    return rule


def one_of(names: Mapping[str, str]) -> Rule:
    def rule(value: Any) -> str | None:
        return None if isinstance(value, str) and value in names else f"one of {', '.join(names)}"

    return rule


def epsilon(value: Any) -> str | None:
    return None if is_number(value) and 0 <= value < 1 else "a number from 0 to below 1"


def switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def token_id(value: Any) -> str | None:
    return None if value is None or (is_int(value) and value >= 0) else "a token id or null"


def token_ids(value: Any) -> str | None:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return None if all(is_int(each) and each >= 0 for each in ids) else "a token id, a list of them, or null"


def as_ids(ids: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """The ids of an `eos_token_id`: none, one, or several."""
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


def shown(value: Any) -> str:
    """The value as the file has it."""
    return json.dumps(value, ensure_ascii=False, default=repr)
