"""What a call costs the host before a GPU has anything to do: checks, torch's dispatcher, launcher, Triton.

    python -m bench.overhead [--json FILE]

Needs no GPU. Triton's driver is a stand-in that writes launches down, and the launchers are registered for
CPU tensors, so a call goes all the way that it goes on CUDA but for the driver's own launch and, for kernels
with tensor descriptors, the encoding of those. The least of many short rounds: others may share the machine.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import gpukernels
from bench.output import require_writable
from bench.report import machine, show
from gpukernels import library
from gpukernels.compile_report import stand_in
from gpukernels.library.registry import LAUNCHERS
from gpukernels.ops import checks

ROUNDS, CALLS = 60, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    try:
        require_writable(options.json)
    except ValueError as fault:
        parser.error(str(fault))
    torch.set_num_threads(1)
    seen: list[tuple[Callable, tuple]] = []
    override = torch.library.Library("gpukernels", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns of what `allow_override` asks for
        for name, launch in LAUNCHERS.items():
            override.impl(name, remembering(launch, seen), "CPU", allow_override=True)
    with stand_in(90) as launches, mock.patch.object(checks, "_torch_side", kernels_everywhere):
        figures = [measure(*call, seen, launches) for call in calls()]
    document = {"machine": machine(), "unit": "microseconds a call", "figures": figures}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    show(
        "Host time of a call in microseconds, without the driver's own launch",
        ["call", "launches", "whole", "of it launcher and Triton", "recording a gradient"],
        [[str(value) for value in figure.values()] for figure in figures],
    )


def kernels_everywhere(device: str, wide: bool):
    return library


def remembering(launch: Callable, seen: list) -> Callable:
    """The launcher, which writes down what it was called with."""

    def remembered(*args):
        seen.append((launch, args))
        return launch(*args)

    return remembered


def calls() -> list[tuple[str, Callable, list[torch.Tensor]]]:
    """The ops of a GPT-2 block, by name: the call, and the tensors that a gradient is recorded for."""

    def half(*shape):
        return torch.zeros(shape, dtype=torch.float16)

    x, norm, weight, bias = half(8, 768), half(768), half(768, 768), half(768)
    rows = half(1024, 768)
    q = half(1, 1024, 12, 64)
    one, cache, lengths = half(1, 12, 64), half(1, 1024, 12, 64), torch.ones(1, dtype=torch.int32)
    logits, targets = half(64, 50304), torch.zeros(64, dtype=torch.int64)
    return [
        ("layer_norm", lambda: gpukernels.layer_norm(rows, norm, bias), [rows]),
        ("linear, 8 rows", lambda: gpukernels.linear(x, weight, bias), []),
        ("linear + gelu", lambda: gpukernels.linear(rows, weight, bias, activation="gelu_new"), [weight]),
        ("attention", lambda: gpukernels.attention(q, q, q), [q]),
        ("decode_attention", lambda: gpukernels.decode_attention(one, cache, cache, lengths), []),
        ("cross_entropy", lambda: gpukernels.cross_entropy(logits, targets), [logits]),
    ]


def measure(name: str, call: Callable, leaves: list, seen: list, launches: list) -> dict:
    """One row: the whole call without a gradient, its launchers alone, and the call when a gradient is recorded."""
    with torch.no_grad():
        call()  # compiles
        seen.clear()
        launches.clear()
        call()
        count, steps = len(launches), list(seen)
        whole = clock(call, seen, launches)
        alone = clock(lambda: [launch(*args) for launch, args in steps], seen, launches)
    gradient = None
    if leaves:
        for leaf in leaves:
            leaf.requires_grad_()
        gradient = clock(call, seen, launches)
        for leaf in leaves:
            leaf.requires_grad_(False)
    return {"call": name, "launches": count, "whole": whole, "launchers": alone, "gradient": gradient}


def clock(call: Callable, *written: list) -> float:
    """Microseconds of a call: the quickest of rounds. What the rounds write down is thrown away."""
    rounds = []
    for _ in range(ROUNDS):
        for each in written:
            each.clear()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    return round(min(rounds), 1)


if __name__ == "__main__":
    main()
