"""What a call of `generate` asks for: every argument checked, prompts as ids, one row for each answer."""

import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpukernels.numbers import whole
from model.config import Config
from model.errors import ModelError, TokenizerError
from model.generate import OVERFLOWS, Limits, Row
from model.sampling import Sampling
from model.tokenizer import Tokenizer

_MOST = 2**24  # rows of a call, and tokens of a row: more is a slip of the hand


@dataclass(frozen=True)
class Request:
    """The rows of a call, and whether it asks for one result alone."""

    rows: list[Row]
    limits: Limits
    single: bool


def read_request(
    prompt: Any,
    config: Config,
    tokenizer: Tokenizer | None,
    *,
    positions: int,
    eos: Sequence[int],
    sampling: Sampling,
    max_new_tokens: Any,
    stop: Any,
    seed: Any,
    n: Any,
    overflow: Any,
) -> Request:
    """The request of `LanguageModel.generate`'s arguments; ModelError for one that cannot be."""
    if max_new_tokens is not None:
        max_new_tokens = require_count("max_new_tokens", max_new_tokens, "1 or more, or None")
    n = require_count("n", n)
    if overflow not in OVERFLOWS:
        raise ModelError(f"overflow must be one of {', '.join(OVERFLOWS)}, got {overflow!r}")
    if overflow == "slide" and max_new_tokens is None:
        raise ModelError('overflow="slide" never ends by itself: give max_new_tokens')
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(each, str) and each for each in stops):
        raise ModelError(f"stop must be a string or several, none of them empty, got {stop!r}")
    if stops:
        require_tokenizer(tokenizer, "stop")

    prompts, single = _prompts(prompt, config, tokenizer)
    limits = Limits(positions, frozenset(eos), overflow, max_new_tokens)
    rows = [
        Row(
            prompts[row // n],
            limits=limits,
            sampling=sampling,
            seed=each,
            stream=stream,
            stops=stops,
            tokenizer=tokenizer,
        )
        for row, (each, stream) in enumerate(_streams(seed, len(prompts) * n))
    ]
    return Request(rows, limits, single and n == 1)


def check_ids(ids: Any, size: int) -> np.ndarray:
    """Token ids as an int64 array of any shape; ModelError where they are not 0 to size - 1."""
    _require_integers(ids)
    given = ids
    try:
        ids = _on_host(given)
    except ValueError:
        raise ModelError("token ids must be one row of integers, or rows of one length") from None
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        kind = type(given).__name__ if ids.dtype == object and not ids.ndim else ids.dtype
        raise ModelError(f"token ids must be integers, got {kind}")
    if ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise ModelError(f"token ids must be 0 to {size - 1}, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int64)


def _require_integers(ids: Any) -> None:
    """ModelError for the first entry of lists that is none: NumPy would make 1 of True, and text of 1 beside "a"."""
    for each in ids if isinstance(ids, list | tuple) else ():
        if isinstance(each, list | tuple):
            _require_integers(each)
        elif not whole(each) and not np.issubdtype((found := _on_host(each)).dtype, np.integer):
            raise ModelError(f"token ids must be integers, got {found.dtype if found.ndim else repr(each)}")


def _on_host(ids: Any) -> np.ndarray:
    return np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)


def require_count(name: str, value: Any, want: str = "1 or more") -> int:
    """`value`, Python's own: NumPy's numbers overflow. ModelError where it is not a whole number from 1."""
    if not (whole(value) and value >= 1):
        raise ModelError(f"{name} must be {want}, got {value!r}")
    if int(value) > _MOST:
        raise ModelError(f"{name} must be at most {_MOST}, got {value!r}")
    return int(value)


def require_tokenizer(tokenizer: Tokenizer | None, what: str) -> None:
    """TokenizerError where there is none."""
    if tokenizer is None:
        raise TokenizerError(f"{what} needs a tokenizer, and this model has none: prompts can be token ids")


def _streams(seed: Any, count: int) -> list[tuple[int, int]]:
    """The seed and the stream of each row."""
    if seed is None:
        seed = secrets.randbits(63)
    if whole(seed):
        streams = [(seed, row) for row in range(count)]
    elif isinstance(seed, Sequence) and not isinstance(seed, str) and len(seed) == count:
        streams = [(each, 0) for each in seed]
    else:
        raise ModelError(f"seed must be a whole number, or a list of {count} (one a row), got {seed!r}")
    if not all(whole(each) and 0 <= int(each) < 2**64 for each, _ in streams):
        raise ModelError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    return [(int(each), stream) for each, stream in streams]  # NumPy's would overflow, and are no JSON


def _prompts(prompt: Any, config: Config, tokenizer: Tokenizer | None) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether there was just one."""

    def encode(text: str) -> list[int]:
        require_tokenizer(tokenizer, "text")
        if ids := tokenizer.encode(text):
            return check_ids(ids, config.vocab_size).tolist()
        if config.bos_token_id is None or config.bos_token_id >= config.vocab_size:
            raise ModelError("the prompt is empty, and the model has no bos token to start from")
        return [config.bos_token_id]

    def row(ids: Any) -> list[int]:
        ids = check_ids(ids, config.vocab_size)
        if ids.ndim != 1 or not ids.size:
            raise ModelError(f"a prompt must have one token id or more in one row, got the shape {ids.shape}")
        return ids.tolist()

    if isinstance(prompt, str):
        return [encode(prompt)], True
    if isinstance(prompt, list | tuple):
        if all(isinstance(each, str) for each in prompt):
            return [encode(each) for each in prompt], False
        if all(hasattr(each, "__len__") and not isinstance(each, str) for each in prompt):
            return [row(each) for each in prompt], False
    if not hasattr(prompt, "__len__") or isinstance(prompt, bytes | bytearray | Mapping | Set):
        raise ModelError(f"prompt must be text, token ids, or several of either, got {prompt!r}")
    ids = check_ids(prompt, config.vocab_size)
    if ids.ndim == 2:
        return [row(each) for each in ids], False
    return [row(ids)], True
