"""`load` and `from_config`: from a name, or from a shape, to a `LanguageModel`."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gpukernels.numbers import whole
from model.architecture import architecture
from model.check import tokenizer_notices
from model.config import PRESETS, Config, generation_eos, read_config
from model.device import Device, choose_device, choose_dtype
from model.errors import ConfigError, ContextError, LoadNotice, ModelError
from model.language_model import LanguageModel
from model.load import fill, fill_random, locate, plan
from model.memory import LOADING, weight_bytes
from model.room import room_for
from model.tokenizer import Tokenizer


def load(
    source: str | Path,
    *,
    device: Any = "auto",
    dtype: Any = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    refresh: bool = False,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Loads a GPT-2, LLaMA or Mistral checkpoint in Hugging Face layout.

    Args:
        source: a folder, a `.safetensors` file beside its `config.json`, "tiny-gpt2" (the embedded
            model), or a name on the Hub ("gpt2", "openai-community/gpt2-xl"). What is on disk comes
            first; a name that is in the Hub's cache asks no network.
        device: "cpu" (NumPy), "cuda", "cuda:1", "auto" (CUDA where it works, else NumPy), or a
            `torch.device` ("cpu" there is plain torch).
        dtype: of the weights: "float32", "float16", "bfloat16" (torch devices), or "auto": float32 on
            the CPU; on CUDA float16, or bfloat16 where the checkpoint has it. On NumPy, float16 halves
            the memory and is widened block by block as it is used, which is slower.
        revision: a branch, tag or commit of the Hub's repository.
        cache_dir, local_files_only, token: as in `huggingface_hub`.
        refresh: ask the Hub for a newer commit although the model is in the cache.
        context: how many tokens a row may have, prompt and answer; default all positions of the model. Keys and
            values take memory for them where rows are kept ready: `LanguageModel.batch`, overflow="slide", CUDA.
        progress: called with the bytes read and the bytes to read.

    Returns:
        The model. What its user should know is in `notices`, and issued as `LoadNotice` warnings.

    Raises:
        ModelError: one of its kinds, with a sentence for every problem found. Nothing has been
            allocated then, unless reading itself failed.

    Memory: each tensor is read straight into its place; the peak is the weights and one 4 MiB buffer. On CUDA
    with CuPy: the weights and 16 MiB on the device, 32 MiB on the host; see `gpukernels.cast.upload`.
    """
    place = choose_device(device)
    choose_dtype(dtype, place)
    if progress is not None and not callable(progress):
        raise ModelError(f"progress must be a function of two numbers, or None, got {progress!r}")
    path = locate(
        source,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        refresh=refresh,
    )
    planned = plan(path)
    context = _positions(context, planned.config)
    tokenizer = Tokenizer.from_folder(planned.folder)
    eos = generation_eos(planned.folder)
    chosen = choose_dtype(dtype, place, planned.stored)
    with _room_for_weights(place, planned.config, chosen, str(source), head=planned.own_head):
        filled = fill(planned, place, chosen, progress)
    notices = planned.notices + filled.notices
    notices += tokenizer_notices(tokenizer, planned.folder, planned.config.vocab_size)
    for notice in notices:
        warnings.warn(notice, LoadNotice, stacklevel=2)
    return LanguageModel(
        planned.config,
        filled.parameters,
        filled=filled,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        values=planned.values,
        folder=planned.folder,
        notices=notices,
        positions=context,
    )


def from_config(config: str | Config, *, seed: int = 0, device: Any = "auto", dtype: Any = "auto") -> LanguageModel:
    """A model with random weights: a preset's name ("gpt2-xl") or a config; no files, no network.

    The weights are drawn as GPT-2's were: N(0, 0.02), residual projections over sqrt(2 L). It has no
    tokenizer: prompts are token ids.

    Raises:
        ConfigError: a name that is no preset's, or a config that `config.json` could not have.
        ModelError: a device, a dtype or a seed that cannot be, or too little memory.
    """
    name = config if isinstance(config, str) else "a model of this config"
    if isinstance(config, str):
        if config not in PRESETS:
            raise ConfigError(f"{config!r} is not a preset: there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a preset's name, a GPT2Config or a LlamaConfig, got {config!r}")
    read_config(config.to_json(), name)
    if seed is not None and not (whole(seed) and seed >= 0):
        raise ModelError(f"seed must be a whole number, 0 or more, got {seed!r}")
    place = choose_device(device)
    dtype = choose_dtype(dtype, place)
    with _room_for_weights(place, config, dtype, name):
        parameters = fill_random(architecture(config).slots(config), config, place, dtype, seed)
    return LanguageModel(config, parameters)


def _positions(context: Any, config: Config) -> int:
    if context is None:
        return config.n_positions
    if not (whole(context) and 1 <= context <= config.n_positions):
        raise ContextError(f"context must be 1 to {config.n_positions}, the model's positions, got {context!r}")
    return int(context)


def _room_for_weights(
    place: Device, config: Config, dtype: str, name: str, *, head: bool | None = None
) -> AbstractContextManager[None]:
    needs = {"weights": weight_bytes(config, dtype, head=head), "buffers": LOADING}
    half = "float16 takes half" if dtype == "float32" else "use a smaller model, or another device"
    return room_for(place, needs, f"{name} as {dtype}", half)
