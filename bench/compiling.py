"""Compiles what the benchmarks and models will launch, many kernels at a time, into Triton's cache.

    python -m bench.compiling [--capability 90] [--jobs 8]

Each process records a call under the compile report's stand-in driver, for the capability of the GPU that is here:
that compiles every kernel as the card will ask for it, and runs nothing. Where the card is, the C code that Triton
launches each kernel with is built too: half a second for each signature. The last line is JSON.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from hashlib import sha256
from typing import Annotated, Any
from unittest import mock

import typer

from bench.report import machine

#: What is compiled: ("case", its name), ("workload", its name) or ("tile", (case, number of the knob, changes)).
Task = tuple[str, Any]


def main(
    capability: Annotated[int | None, typer.Option(help="80, 89, 90 or 100; that of this GPU.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only the shapes of this op; may be repeated.")] = None,
) -> None:
    """Compile, and say how much and how long it took."""
    from bench.kernel_cases import chosen
    from gpukernels.compile_report import CHIPS
    from model.workloads import WORKLOADS

    here = _capability()
    if capability is None and here is None:
        _refuse("there is no CUDA GPU here; say --capability")
    capability = capability or here
    if capability not in CHIPS:
        _refuse(f"capability must be one of {', '.join(map(str, CHIPS))}, got {capability}")
    try:
        tasks: list[Task] = [("case", case.name) for case in chosen(op, quick=False)]
    except ValueError as fault:
        _refuse(str(fault))
    if not op:
        tasks += [("workload", name) for name in WORKLOADS]
    start = time.perf_counter()
    with processes(jobs) as pool:
        found = compiled(tasks, pool, capability)
    seconds = time.perf_counter() - start
    kernels = set().union(*(kernels for kernels, _ in found))
    faults = {f"{task[0]} {task[1]}": fault for task, (_, fault) in zip(tasks, found, strict=True) if fault}
    for task, fault in faults.items():
        print(f"{task}: {fault}", file=sys.stderr)
    print(f"{len(kernels)} binaries for sm_{capability}, {len(tasks)} calls recorded, {seconds:.0f} s")
    document = {"bench": "compiling", "machine": machine(), "capability": capability, "calls": len(tasks)}
    print(json.dumps(document | {"binaries": len(kernels), "seconds": seconds, "faults": faults}))
    if faults:
        sys.exit(1)


def processes(jobs: int | None = None) -> Executor:
    """As many as there are cores, started afresh: a copy of this one would have CUDA in an unknown state."""
    return ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def compiled(tasks: Sequence[Task], pool: Executor, capability: int | None = None) -> list[tuple[set, str | None]]:
    """For each task the digests of its binaries, and what went wrong; default for the GPU that is here."""
    here = _capability()
    capability = capability or here
    return list(pool.map(_compiled, [(*task, capability, capability == here) for task in tasks]))


def _capability() -> int | None:
    """Of this GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _compiled(task: tuple[str, Any, int, bool]) -> tuple[set[bytes], str | None]:
    from bench.kernel_rows import in_a_line

    kind, which, capability, launched = task
    try:
        with _launchers() if launched else contextlib.nullcontext():
            return {sha256(each.compiled.cubin).digest() for each in _recorded(kind, which, capability)}, None
    except Exception as fault:  # one call that does not compile leaves the others
        return set(), in_a_line(fault)


def _recorded(kind: str, which: Any, capability: int) -> list:
    from bench.kernel_cases import CASES
    from bench.predicted import recorded
    from gpukernels.compile_report import record
    from model.workloads import WORKLOADS

    cases = {case.name: case for case in CASES}
    if kind == "workload":
        return record(WORKLOADS[which], capability=capability)
    if kind == "case":
        return [each for way in cases[which].directions for each in recorded(cases[which], way, capability)]
    from bench.tune import KNOBS

    name, number, changes = which
    knob = KNOBS[cases[name].op][number]
    with knob.trying(changes):
        return recorded(cases[name], knob.direction, capability)


@contextlib.contextmanager
def _launchers() -> Iterator[None]:
    """While this lasts, the stand-in driver also builds what the real one will load."""
    from triton.backends.nvidia.driver import CudaLauncher

    from gpukernels.compile_report.recording import _Driver

    stand_in = _Driver.launcher_cls

    def both(self, source, metadata):
        CudaLauncher(source, metadata)
        return stand_in(self, source, metadata)

    with mock.patch.object(_Driver, "launcher_cls", both):
        yield


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
