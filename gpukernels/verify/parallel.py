"""Ops verified side by side: on a GPU compiling takes the time, in Triton's interpreter all of it does."""

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

import numpy as np
import torch

from gpukernels.emulator import emulated
from gpukernels.verify.run import Verdict, verify

MOST = 8  # processes: on a GPU each has CUDA's context, half a GiB


def gather(
    ops: Sequence[str],
    dtypes: Sequence[str],
    device: torch.device | None,
    *,
    quick: bool = False,
    processes: int | None = None,
    capability: int | None = None,
) -> Iterator[tuple[str, list[Verdict]]]:
    """The verdicts on each op in all dtypes, as they are done.

    Args:
        device, quick: as for `verify`.
        capability: of a GPU that is emulated (see `gpukernels.emulator`), for tensors of the CPU.
        processes: how many work; default as many as this one may have cores, and `MOST` at most. 1: this one.

    With several, each op has one of its own: a kernel that ends a process, or CUDA in it, ends no other op.
    """
    if device is None:  # NumPy's cases take a moment
        processes = 1
    processes = min(len(ops), processes or min(MOST, len(os.sched_getaffinity(0))))
    if processes <= 1:
        for op in ops:
            yield op, _verdicts(op, dtypes, device, quick, capability)
        return
    with ThreadPoolExecutor(processes) as pool:
        # The slowest first, so that none is left alone in the end.
        order = sorted(ops, key=lambda op: op != "attention")
        futures = {pool.submit(_apart, op, dtypes, device, quick, capability): op for op in order}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _apart(op: str, dtypes: Sequence[str], device: torch.device, quick: bool, capability: int | None) -> list[Verdict]:
    """The verdicts of another process; of one that ends without them, a row for each dtype that says so."""
    # Copies of a process that has imported everything and done nothing: one of this would have its locks, and CUDA,
    # in an unknown state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, op, dtypes, device, quick, capability), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        text = f"its process ended with code {process.exitcode}"
        return [Verdict(op, dtype, "forward", 0, np.inf, "", "", (), text) for dtype in dtypes]


def _send(pipe: Connection, *arguments) -> None:
    pipe.send(_verdicts(*arguments))


def _verdicts(
    op: str, dtypes: Sequence[str], device: torch.device | None, quick: bool, capability: int | None
) -> list[Verdict]:
    with warnings.catch_warnings(), emulated(capability) if capability else contextlib.nullcontext():
        warnings.simplefilter("ignore", RuntimeWarning)  # infinities, which the cases mean
        return [verdict for dtype in dtypes for verdict in verify(op, dtype, device, quick=quick)]
