"""Decoding on a GPU, measured: the answers first, then every runtime in turn, round by round, each in its process.

A case is a batch of prompts of one length and a number of new tokens. Two times are taken of each: of the first
token alone, and of all. What lies between, by the tokens but one, is the latency of a token.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.cost_card import step
from bench.cuda_providers import JUDGE, NUMPY, Runtime, chosen
from bench.timing import Times, interleaved
from bench.worker import Worker, Workers
from model.config import Config
from model.llama_config import LlamaConfig

Row = dict[str, Any]


class Case(NamedTuple):
    """What is asked of every runtime."""

    batch: int
    context: int  # tokens of each prompt
    new: int

    @classmethod
    def read(cls, text: str) -> "Case":
        """Of "8x128+32"; ValueError for anything else, and for fewer than 2 new tokens."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
        if found is None or int(found[3]) < 2:
            raise ValueError(f"a case must be BATCHxPROMPT+NEW with 2 new tokens or more, as 8x128+32, got {text!r}")
        return cls(*map(int, found.groups()))

    def check(self, configs: Iterable[Config]) -> None:
        """ValueError where a model has fewer positions."""
        for config in configs:
            if self.context + self.new > config.n_positions:
                raise ValueError(
                    f"{self.context} + {self.new} tokens are more than the {config.n_positions} positions of the model"
                )


#: The protocols of published figures, then longer prompts and larger batches.
SHORT, LONG = Case(1, 128, 32), Case(1, 900, 32)
CASES = (SHORT, Case(1, 64, 128), LONG, Case(8, 128, 32), Case(64, 128, 32), Case(8, 900, 32), Case(64, 900, 32))

# A logit of float16 or bfloat16 arithmetic is off by up to 2**-11 or 2**-8 a product and layer, of the largest:
# a token that is chosen may be so much below the best one. That catches a wrong model and not the rounding.
_SLACK = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-3}
_JUDGED = 4  # rows of a batch: the judge's logits are float32, of every position


def measure(
    preset: str,
    config: Config,
    cases: Sequence[Case],
    *,
    device: str,
    dtype: str,
    rounds: int,
    compiled: bool,
    bandwidth: float | None,
    numpy: bool = False,
    persistent: bool = False,
    start: Callable[..., Worker] = Worker,
) -> Iterator[list[Row]]:
    """Case by case, a row for each runtime. Each is in a process of its own; one that fails starts again, once.

    Args:
        bandwidth: bytes a second of this device, None where it is not known.
        numpy: also our NumPy path, in the first case, when all others are through: its threads spin.
        persistent: also our step in one launch, where the model has one.
        start: starts a worker.
    """
    config = _fitted(config, cases)
    names = chosen(device, compiled=compiled, persistent=persistent)
    makes = {name: (Runtime, name, config, device, dtype) for name in (*names, NUMPY, JUDGE)}
    with Workers(makes, start) as workers:
        for case in cases:
            floor = None
            if bandwidth is not None:
                mean = case.context + case.new // 2
                floor = step(config, dtype, batch=case.batch, context=mean).floor(bandwidth)
            workers.start((*names, JUDGE))
            rows = _rows(workers, names, case, _prompts(case, config), dtype, rounds, floor)
            yield [{"preset": preset, **row} for row in rows]
        if numpy:
            workers.close(names)
            workers.start((NUMPY, JUDGE))
            rows = _rows(workers, [NUMPY], cases[0], _prompts(cases[0], config), "float32", 2, None)
            yield [{"preset": preset, **row} for row in rows]


def _fitted(config: Config, cases: Sequence[Case]) -> Config:
    """Of rotary positions no more thousands than the cases need: some of the runtimes keep a cache for all of them."""
    if not isinstance(config, LlamaConfig):
        return config
    needed = max(case.context + case.new for case in cases)
    return replace(config, max_position_embeddings=min(config.n_positions, -(-needed // 1024) * 1024))


def _rows(
    workers: Workers,
    names: Sequence[str],
    case: Case,
    prompts: list[list[int]],
    dtype: str,
    rounds: int,
    floor: float | None,
) -> list[Row]:
    found = {name: _judged(workers, name, prompts, case.new) for name in names}
    faults: dict[str, Exception] = {}

    def timed(new: int, names: Iterable[str]) -> dict[str, Times]:
        runs = {name: lambda name=name: workers.call(name, "generate", prompts, new)[1] for name in names}
        return interleaved(runs, rounds=rounds, pause=0, faults=faults)

    first = timed(1, [name for name in names if found[name].get("regret", np.inf) <= _SLACK[dtype]])
    whole = timed(case.new, first)
    found |= {name: {"fault": _line(fault)} for name, fault in faults.items()}
    rows = []
    for name, answer in found.items():
        row: Row = {"dtype": dtype, **case._asdict(), "runtime": name, **answer}
        if name in whole:
            row |= _figures(case, first[name], whole[name], floor)
            row["over"] = {other: whole[name].speedup(times) for other, times in whole.items() if other != name}
        rows.append(row)
    return rows


def _prompts(case: Case, config: Config) -> list[list[int]]:
    return np.random.default_rng(case).integers(0, config.vocab_size, (case.batch, case.context)).tolist()


def _judged(workers: Workers, name: str, prompts: list[list[int]], new: int) -> Row:
    """regret: see `Runtime.regret`; or a fault, of one runtime: the others can still be measured."""
    try:
        warm_up = workers.call(name, "warm_up", len(prompts))[0]
        tokens = workers.call(name, "generate", prompts, new)[0]
    except RuntimeError as fault:
        return {"fault": _line(fault)}
    if [len(each) for each in tokens] != [new] * len(prompts):
        return {"fault": "another number of tokens"}
    if min(map(min, tokens)) < 0:  # the judge's table has no such row
        return {"fault": "a token of -1: its logits are not finite"}
    try:
        return {"regret": workers.call(JUDGE, "regret", prompts[:_JUDGED], tokens[:_JUDGED])[0], **warm_up}
    except RuntimeError as fault:
        return {"fault": f"not judged: {_line(fault)}"}


def _line(fault: Exception) -> str:
    return str(fault).splitlines()[0]


def _figures(case: Case, first: Times, whole: Times, floor: float | None) -> Row:
    token = (whole.median - first.median) / (case.new - 1)
    figures: Row = {
        "first_token_ms": first.median * 1e3,
        "token_ms": token * 1e3,
        "decode_tokens_per_second": case.batch / token,
        "tokens_per_second": case.batch * case.new / whole.median,
        "tokens_per_second_20_80": [case.batch * case.new / whole.quantile(q) for q in (0.8, 0.2)],
    }
    return figures if floor is None else figures | {"floor_ms": floor * 1e3, "share_of_bandwidth": floor / token}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on this GPU: the best of a few."""
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best
