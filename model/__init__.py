"""Transformer language models on the ops of `gpukernels`: load, generate, save.

import model

lm = model.load("tiny-gpt2")
print(lm.generate("And Moses said unto", max_new_tokens=40).text)
"""

from model.config import PRESETS, GPT2Config, LlamaConfig
from model.errors import (
    CheckpointError,
    ConfigError,
    ContextError,
    DataError,
    DeviceError,
    HubError,
    LoadNotice,
    ModelError,
    OutOfMemoryError,
    TokenizerError,
)
from model.generate import Generation
from model.language_model import LanguageModel
from model.loading import from_config, load
from model.parameters import Parameters
from model.prompts import Prompt, few_shot
from model.sampling import Sampling
from model.stream import Batch, Stream
from model.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "DataError",
    "DeviceError",
    "GPT2Config",
    "Generation",
    "HubError",
    "LanguageModel",
    "LlamaConfig",
    "LoadNotice",
    "ModelError",
    "OutOfMemoryError",
    "Parameters",
    "Prompt",
    "Sampling",
    "Stream",
    "Tokenizer",
    "TokenizerError",
    "few_shot",
    "from_config",
    "load",
]
