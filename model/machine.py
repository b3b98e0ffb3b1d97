"""This machine, as a bug report needs it. Every answer may be missing, and says so by being None."""

import ctypes
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

#: What decides how many threads a BLAS or OpenMP has.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    """Name, cores of the machine, and cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count()
    return {"name": _processor_name(), "cores": cores, "usable_cores": len(affinity(0)) if affinity else cores}


def _processor_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def memory() -> int | None:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def blas() -> dict[str, Any]:
    """NumPy's BLAS, how many threads it uses, and what the environment says of that."""
    import numpy as np

    found = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "name": found.get("name", "unknown"),
        "version": found.get("version") or None,
        "threads": _openblas_threads(),
        "environment": {name: os.environ[name] for name in _THREADS if name in os.environ},
    }


def _openblas_threads() -> int | None:
    """Asks the OpenBLAS that is loaded; None for another BLAS."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for path in {line.split(maxsplit=5)[-1] for line in maps if "openblas" in line}:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_", "openblas_get_num_threads"):
            if hasattr(library, name):
                return int(getattr(library, name)())
    return None


def driver_version() -> str | None:
    """That of the NVIDIA driver, by its management library."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0 or library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return None
    return text.value.decode()


def gpus() -> list[dict[str, Any]]:
    """What torch sees, where it can use CUDA."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory": gpu.total_memory,
                "multiprocessors": gpu.multi_processor_count,
            }
        )
    return found
