"""`gpukernels env`: versions, devices, and what will run."""

import json
import platform
from importlib import metadata

from rich.console import Console
from rich.table import Table

from model.cli.options import Json
from model.device import choose_device, why_no_cuda

_PACKAGES = (
    "gpukernels",
    "numpy",
    "torch",
    "triton",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "transformers",
)


def env(as_json: Json = False) -> None:
    """Show versions and devices, and which implementation will run and why."""
    reason = why_no_cuda()
    devices = [] if reason else _gpus()
    if reason:
        runs = "NumPy on the CPU (gpukernels/numpy_ops), float32"
        why = reason
    else:
        kernels = "Triton kernels" if _version("triton") else "plain torch (Triton is not installed)"
        runs = f"{kernels} on cuda:0, float16, or bfloat16 for a bfloat16 checkpoint"
        why = "the driver sees a GPU and torch can use it"
    versions = {name: _version(name) for name in _PACKAGES}
    document = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "blas": _blas(),
        "gpus": devices,
        "device_auto": "cpu" if reason else "cuda",
        "runs": runs,
        "why": why,
        "loads": choose_device("auto").how_it_loads(),
    }
    if as_json:
        print(json.dumps(document))
        return
    table = Table(show_header=False)
    table.add_row("Python", f"{document['python']} on {document['platform']}")
    for name, version in versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("BLAS of NumPy", document["blas"])
    for number, gpu in enumerate(devices):
        table.add_row(f"cuda:{number}", gpu)
    table.add_row("device=auto runs", runs)
    table.add_row("because", why)
    table.add_row("weights are", document["loads"])
    Console(highlight=False).print(table)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _blas() -> str:
    import numpy as np

    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _gpus() -> list[str]:
    import torch

    names = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
    return names
