"""Decoding on a GPU, measured: the answers first, then every runtime in turn, round by round.

A case is a batch of prompts of one length and a number of new tokens. Two times are taken of each: of the first
token alone, and of all. What lies between, by the tokens but one, is the latency of a token.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.cost_card import step
from bench.cuda_providers import NUMPY, OURS, Generate, Judge, judge, on_numpy, providers, random_model
from bench.timing import Times, interleaved
from model.gpt2_config import GPT2Config

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

    def check(self, configs: Iterable[GPT2Config]) -> None:
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
    config: GPT2Config,
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: str,
    rounds: int,
    compiled: bool,
    bandwidth: float | None,
    numpy: bool = False,
    persistent: bool = False,
) -> Iterator[list[Row]]:
    """Case by case, a row for each runtime.

    Args:
        bandwidth: bytes a second of this device, None where it is not known.
        numpy: also our NumPy path, in the first case, when all others are through: its threads spin.
        persistent: also our step in one launch, where the model has one.
    """
    lm = random_model(config, device, dtype)
    runs, truth = providers(lm, compiled=compiled, persistent=persistent), judge(lm)
    for case in cases:
        prompts = _prompts(case, config)
        warm_up: dict[str, Row] = {}
        try:
            warm_up[OURS] = {"warm_up_seconds": lm.warm_up(case.batch)}
        except Exception as fault:  # of ours; its answers may still come, and the others'
            warm_up[OURS] = {"warm_up_fault": _said(fault)}
        found = {name: _judged(run, prompts, case.new, truth) for name, run in runs.items()}
        right = {name: run for name, run in runs.items() if _is_right(found[name], dtype)}
        faults: dict[str, Exception] = {}
        options = {"rounds": rounds, "pause": 0, "faults": faults}
        first = interleaved({name: _timed(run, prompts, 1) for name, run in right.items()}, **options)
        whole = interleaved({name: _timed(right[name], prompts, case.new) for name in first}, **options)
        found |= {name: {"fault": _said(fault)} for name, fault in faults.items()}
        floor = None
        if bandwidth is not None:
            mean = case.context + case.new // 2
            floor = step(config, dtype, batch=case.batch, context=mean).floor(bandwidth)
        rows = []
        for name, answer in found.items():
            row: Row = {"preset": preset, "dtype": dtype, **case._asdict(), "runtime": name, **answer}
            if name in whole:
                row |= _figures(case, first[name], whole[name], floor) | warm_up.get(name, {})
                row["over"] = {other: whole[name].speedup(times) for other, times in whole.items() if other != name}
            rows.append(row)
        yield rows
    if numpy:
        case, run = cases[0], on_numpy(lm)
        prompts = _prompts(case, config)
        row = {"preset": preset, "dtype": "float32", **case._asdict(), "runtime": NUMPY}
        row |= _judged(run, prompts, case.new, truth)
        if _is_right(row, "float32"):
            first, whole = (
                interleaved({NUMPY: _timed(run, prompts, new)}, rounds=2, pause=0)[NUMPY] for new in (1, case.new)
            )
            row |= _figures(case, first, whole, None) | {"over": {}}
        yield [row]


def _prompts(case: Case, config: GPT2Config) -> list[list[int]]:
    return np.random.default_rng(case).integers(0, config.vocab_size, (case.batch, case.context)).tolist()


def _is_right(answer: Row, dtype: str) -> bool:
    return answer.get("regret", np.inf) <= _SLACK[dtype]


def _judged(run: Generate, prompts: Sequence[Sequence[int]], new: int, truth: Judge) -> Row:
    """regret: how far below the best logit a chosen token's is, at worst, as a share of the largest; or a fault."""
    try:
        tokens = run(prompts, new)
    except Exception as fault:  # of one runtime; the others can still be measured
        return {"fault": _said(fault)}
    if [len(each) for each in tokens] != [new] * len(prompts):
        return {"fault": "another number of tokens"}
    if min(map(min, tokens)) < 0:  # the judge's table has no such row, and a GPU does not recover from reading one
        return {"fault": "a token of -1: its logits are not finite"}
    worst = 0.0
    for prompt, chosen in list(zip(prompts, tokens, strict=True))[:_JUDGED]:
        logits = truth.logits([*prompt, *chosen])[len(prompt) - 1 : -1]
        behind = logits.max(1) - logits[np.arange(new), chosen]
        worst = max(worst, float((behind / np.abs(logits).max(1)).max()))
    return {"regret": worst}


def _said(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}".splitlines()[0]


def _timed(run: Generate, prompts: Sequence[Sequence[int]], new: int) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run(prompts, new)  # tokens on the host: the device has ended
        return time.perf_counter() - start

    return timed


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
