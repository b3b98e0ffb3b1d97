"""Compiling what a model will launch before somebody waits for it."""

import time

from model.graph import GraphDecoder
from model.language_model import LanguageModel

#: Lengths of prompts that between them launch what a prompt of any length does: few rows and many have kernels of
#: their own, each compiled once for sizes that are multiples of 16 and once for others; the smallest prompts have
#: tiles of their own where they enter the cache.
PROMPTS = (1, 2, 4, 8, 15, 16, 65, 80)


def warm_up(lm: LanguageModel, *, rows: int = 1) -> float:
    """Compiles what generating with up to `rows` sequences at a time launches, and captures its graphs; seconds.

    Triton keeps what it compiled on disk, so that the next process compiles nothing. The graphs stay with `lm`.
    """
    started = time.perf_counter()
    decoder = lm._decoder(rows, lm.config.n_positions)
    try:
        for length in PROMPTS:
            if length <= lm.config.n_positions:
                decoder.prefill(0, [0] * length)
        if isinstance(decoder, GraphDecoder):
            decoder.warm_up()
    finally:
        lm._give_back(decoder)
    return time.perf_counter() - started
