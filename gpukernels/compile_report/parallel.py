"""Many recordings, in several processes: compiling is what takes the time, and Triton keeps what it compiled."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from gpukernels.compile_report.recording import record
from gpukernels.compile_report.report import Row, rows


def gather(
    functions: Mapping[str, Callable[[], Any]], capabilities: Sequence[int], *, processes: int | None = None
) -> Iterator[tuple[str, int, list[Row]]]:
    """(name, capability, rows) of each function for each capability, as they are done.

    Args:
        functions: what `record` records, by name. Other processes get them pickled.
        processes: how many work; default as many as this one may have cores. 1: this one.

    Raises as `record` does.
    """
    tasks = [(name, capability) for capability in capabilities for name in functions]
    processes = min(len(tasks), processes or len(os.sched_getaffinity(0)))
    if processes <= 1:
        for name, capability in tasks:
            yield name, capability, _rows(functions[name], capability)
        return
    # Started afresh: a copy of this process would have its locks, and CUDA, in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(_rows, functions[name], capability): (name, capability) for name, capability in tasks}
        for future in as_completed(futures):
            yield *futures[future], future.result()


def _rows(function: Callable[[], Any], capability: int) -> list[Row]:
    return rows(record(function, capability=capability), capability)
