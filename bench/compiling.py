"""Compiles what the benchmarks and models will launch, many kernels at a time, into Triton's cache.

    python -m bench.compiling [--capability 90] [--jobs 8]

Each process records a call under the compile report's stand-in driver, for the capability of the GPU that is here:
that compiles every kernel as the card will ask for it, and runs nothing. The last line is JSON.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from typing import Annotated

import typer

from bench.report import machine


def main(
    capability: Annotated[int | None, typer.Option(help="80, 89, 90 or 100; that of this GPU.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only the shapes of this op; may be repeated.")] = None,
) -> None:
    """Compile, and say how much and how long it took."""
    import torch

    from bench.kernel_cases import CASES, chosen
    from gpukernels.compile_report import CHIPS
    from model.workloads import WORKLOADS

    if capability is None:
        if not torch.cuda.is_available():
            _refuse("there is no CUDA GPU here; say --capability")
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    if capability not in CHIPS:
        _refuse(f"capability must be one of {', '.join(map(str, CHIPS))}, got {capability}")
    try:
        cases = chosen(op, quick=False)
    except ValueError as fault:
        _refuse(str(fault))
    tasks = [("case", CASES.index(case), capability) for case in cases]
    if not op:
        tasks += [("workload", name, capability) for name in WORKLOADS]
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        found = list(pool.map(_compiled, tasks))
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


def _compiled(task: tuple[str, int | str, int]) -> tuple[set[bytes], str | None]:
    """The digests of one call's binaries, and what went wrong."""
    from bench.kernel_cases import CASES
    from bench.kernel_rows import in_a_line
    from bench.predicted import recorded
    from gpukernels.compile_report import record
    from model.workloads import WORKLOADS

    kind, which, capability = task
    try:
        if kind == "workload":
            launches = record(WORKLOADS[which], capability=capability)
        else:
            case = CASES[which]
            launches = [each for way in case.directions for each in recorded(case, way, capability)]
        return {sha256(launch.compiled.cubin).digest() for launch in launches}, None
    except Exception as fault:  # one call that does not compile leaves the others
        return set(), in_a_line(fault)


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
