"""From the values of a `config.json` to the config of an architecture, and the shapes that go by a name.

`GPT2Config` and `LlamaConfig` have their own keys, and these names in common, by which the runtime asks:
vocab_size, n_positions, n_embd, n_layer, n_head, kv_heads, head_width, feed_forward_width, tie_word_embeddings,
bos_token_id, eos_token_id, and `to_json()`.
"""

import os
from pathlib import Path
from typing import Any

from model import gpt2_config, llama_config
from model.contract import as_ids, shown, token_ids
from model.errors import ConfigError
from model.files import read_json
from model.gpt2_config import GPT2Config
from model.llama_config import LlamaConfig

Config = GPT2Config | LlamaConfig

_READERS = {"gpt2": gpt2_config.read, "llama": llama_config.read, "mistral": llama_config.read}

#: Shapes by name, for which neither files nor network are needed.
PRESETS: dict[str, Config] = {**gpt2_config.PRESETS, **llama_config.PRESETS}


def generation_eos(folder: Path) -> tuple[int, ...] | None:
    """The eos ids of `generation_config.json`, which come before config.json's; None if it has none."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return None
    ids = read_json(path).get("eos_token_id")
    if ids is None:
        return None
    wanted = token_ids(ids)
    if wanted:
        raise ConfigError(f"{path}: eos_token_id must be {wanted}, got {shown(ids)}")
    return as_ids(ids)


def read_config(values: dict[str, Any], name: str = "config.json") -> tuple[Config, list[str]]:
    """The config in the values of a `config.json`, and notices of the keys it does not know.

    Raises ConfigError with a sentence for every key that is refused or has a value of the wrong kind.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        got = "it is missing" if "model_type" not in values else f"got {shown(kind)}"
        known = ", ".join(map(shown, _READERS))
        raise ConfigError(f"{name}: model_type must be one of {known}, the architectures computed here; {got}")
    return _READERS[kind](values, name)
