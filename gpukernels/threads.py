"""Threads on the CPU: as many as OpenBLAS has, and some of our own where NumPy has none."""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

#: Of our own, at most: every pass over a block takes Python's lock, and more threads would wait for that.
MOST = 8


def blas_threads() -> int:
    """How many OpenBLAS takes: what it is told, at most one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_told("OPENBLAS_NUM_THREADS") or _told("OMP_NUM_THREADS") or cores, cores)


def _told(variable: str) -> int:
    """The number that it begins with, as C reads it ("4,2" of OpenMP is 4); 0, which says nothing, for any other."""
    number = re.match(r"\s*\+?([0-9]+)", os.environ.get(variable, ""))
    return int(number[1]) if number else 0


def threads() -> int:
    """How many share a pass that NumPy has no threads for; the one that asks is one of them."""
    return min(blas_threads(), MOST)


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Those beside the one that asks."""
    return ThreadPoolExecutor(max(1, threads() - 1), "gpukernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a forked process has none of the threads
