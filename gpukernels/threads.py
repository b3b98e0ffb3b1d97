"""Threads on the CPU: as many as OpenBLAS has, and some of our own where NumPy has none."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def blas_threads() -> int:
    """How many OpenBLAS takes: what it is told, at most one for each core."""
    asked = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    cores = os.cpu_count() or 1
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


@functools.cache
def pool() -> ThreadPoolExecutor:
    """As many as there are beside the one that asks."""
    return ThreadPoolExecutor(max(1, blas_threads() - 1), "gpukernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a forked process has none of the threads
