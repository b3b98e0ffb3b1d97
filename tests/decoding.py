"""Models, requests and a captured form without CUDA, for the tests of decoders on every device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import model
from model.config import Config, GPT2Config, LlamaConfig
from model.decoder import Decoder
from model.generate import Limits, Row, run
from model.graph import GraphDecoder
from model.sampling import Sampling

CONFIG = GPT2Config(vocab_size=61, n_positions=40, n_embd=48, n_layer=2, n_head=3)

#: (prompt, most new tokens, sampling): rows of every length, some of which end while others run.
REQUESTS = [
    ([3, 1, 4], 12, Sampling()),
    ([1], 1, Sampling(temperature=1.0)),
    (list(range(20)), 6, Sampling(temperature=0.8, top_k=9)),
    ([5, 9], 9, Sampling(repetition_penalty=1.7)),
    ([2, 6, 5, 3], 14, Sampling(temperature=1.3, top_p=0.8, min_p=0.02)),
    ([7] * 11, 5, Sampling(temperature=0.9, repetition_penalty=1.2)),
    ([8], 3, Sampling()),
]


#: As large, with grouped heads and a window that rows outgrow.
MISTRAL = LlamaConfig(
    model_type="mistral",
    vocab_size=61,
    max_position_embeddings=40,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    sliding_window=9,
    bos_token_id=None,
    eos_token_id=None,
)


def lively(device: Any, dtype: str = "float32", *, config: Config = CONFIG, **changed) -> model.LanguageModel:
    """A small model whose logits are far apart, so that a rounding changes no choice. changed: of its config."""
    lm = model.from_config(dataclasses.replace(config, **changed), seed=3, device=device, dtype=dtype)
    for name, array in lm.parameters.items():
        if array.ndim == 2:
            lm.parameters[name] = array * 6
    return lm


def generated(
    decoder: Decoder,
    *,
    slots: int,
    overflow: str = "error",
    eos: frozenset[int] = frozenset(),
    only: Sequence[int] = range(len(REQUESTS)),
) -> list:
    """The tokens of REQUESTS, or of some of them, `slots` at a time."""
    rows = []
    for stream in only:
        prompt, new, sampling = REQUESTS[stream]
        limits = Limits(decoder._config.n_positions, eos, overflow, new)
        rows.append(Row(prompt, limits=limits, sampling=sampling, seed=11, stream=stream, stops=(), tokenizer=None))
    for _ in run(decoder, rows, slots=slots, limits=limits):
        pass
    assert decoder.lengths == [0] * decoder.rows
    return [row.tokens for row in rows]


def replayed(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """`model.graph.Capture` where there is no CUDA: runs what it has captured, and writes the same memory each time."""
    result = function()

    def replay() -> None:
        fresh = function()
        if isinstance(result, np.ndarray):
            np.copyto(result, fresh)
        else:
            result.copy_(fresh)

    return replay, result


def decoder_of(
    lm: model.LanguageModel, *, rows: int, captured: bool = False, ahead: bool = False, **changed
) -> Decoder:
    """captured: as CUDA graphs where there is CUDA."""
    options = {"rows": rows, "capacity": lm.config.n_positions}
    config = dataclasses.replace(lm.config, **changed)
    if captured:
        capture = None if lm.parameters.device.name.startswith("cuda") else replayed
        decoder = GraphDecoder(lm.parameters, config, **options, capture=capture)
    else:
        decoder = Decoder(lm.parameters, config, **options)
    decoder.ahead = ahead
    return decoder


def check_a_row_that_is_not_finite(lm: model.LanguageModel, *, captured: bool) -> None:
    """It says -1, and its neighbours say what they do alone: three rows of a bucket of four."""
    options = Sampling(temperature=0.7, top_k=20, repetition_penalty=1.2)

    def tokens(*prompts):
        decoder = decoder_of(lm, rows=6, captured=captured)
        first = [decoder.start(row, prompt, options, seed=5)()[0] for row, prompt in enumerate(prompts)]
        return [first] + [decoder.step(len(prompts))() for _ in range(3)]

    prompts = [[2, 7], [1, 2, 3, 4], [5]]
    wanted = tokens(*prompts)
    positions = lm.parameters["positions.weight"] * 1
    positions[5] = float("nan")  # where the second row is at its second step
    lm.parameters["positions.weight"] = positions
    found = tokens(*prompts)
    assert [[row[0], row[2]] for row in found] == [[row[0], row[2]] for row in wanted]
    assert [row[1] for row in found] == [wanted[0][1], wanted[1][1], -1, -1]
