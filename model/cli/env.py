"""`gpukernels env`: the machine, the versions, and what will run, as a bug report needs them."""

import importlib.util
import json
import platform
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from gpukernels.dispatch import choices
from model import machine
from model.cli.options import Json
from model.device import choose_device, why_no_cuda
from model.memory import human

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
    "peft",
    "matplotlib",
)


def env(as_json: Json = False) -> None:
    """Show the machine, versions and devices, and which implementation will run for each op and dtype, and why."""
    document = _document(why_no_cuda())
    if as_json:
        print(json.dumps(document))
        return
    table = Table(show_header=False)
    for name, value in _lines(document):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _document(reason: str | None) -> dict[str, Any]:
    """reason: why CUDA cannot be used, or None."""
    if reason:
        runs = "NumPy on the CPU (gpukernels/numpy_ops), float32"
        why = reason
    else:
        kernels = "Triton kernels" if importlib.util.find_spec("triton") else "plain torch (Triton is not installed)"
        runs = f"{kernels} on cuda:0, float16, or bfloat16 for a bfloat16 checkpoint"
        why = "the driver sees a GPU and torch can use it"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": machine.processor(),
        "memory": machine.memory(),
        "packages": {name: machine.version(name) for name in _PACKAGES},
        "blas": machine.blas(),
        "driver": machine.driver_version(),
        "cuda": None if reason else _cuda(),
        "gpus": [] if reason else machine.gpus(),
        "device_auto": "cpu" if reason else "cuda",
        "runs": runs,
        "why": why,
        "loads": choose_device("auto").how_it_loads(),
        "ops": {
            op: {dtype: choice._asdict() for dtype, choice in by_dtype.items()}
            for op, by_dtype in choices(None if reason else "cuda").items()
        },
    }


def _cuda() -> str | None:
    """The version that torch was built with."""
    import torch

    return torch.version.cuda


def _lines(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The document as a table: name and value."""
    yield "Python", f"{document['python']} on {document['platform']}"
    cpu, memory = document["processor"], document["memory"]
    yield "processor", f"{cpu['name']}, {cpu['cores']} cores, {cpu['usable_cores']} of them for this process"
    yield "memory", "unknown" if memory is None else human(memory)
    for name, value in document["packages"].items():
        yield name, value or "not installed"
    blas = document["blas"]
    threads = "an unknown number of threads" if blas["threads"] is None else f"{blas['threads']} thread(s)"
    settings = "".join(f", {name}={value}" for name, value in blas["environment"].items())
    yield "BLAS of NumPy", f"{blas['name']} {blas['version'] or ''}, {threads}{settings}"
    yield "NVIDIA driver", document["driver"] or "none"
    if document["cuda"]:
        yield "CUDA of torch", document["cuda"]
    for number, gpu in enumerate(document["gpus"]):
        size = f"{human(gpu['memory'])}, {gpu['multiprocessors']} multiprocessors"
        yield f"cuda:{number}", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {size}"
    yield "device=auto runs", document["runs"]
    yield "because", document["why"]
    yield "weights are", document["loads"]
    for dtype, ops in _by_dtype(document["ops"]).items():
        for (runs, why), names in ops.items():
            some = "" if len(names) == len(document["ops"]) else f"{', '.join(names)}: "
            yield f"in {dtype}", f"{some}{runs or 'nothing'}: {why}"


def _by_dtype(ops: dict[str, dict[str, dict]]) -> dict[str, dict[tuple, list[str]]]:
    """By dtype, and by what runs and why: the ops."""
    found: dict[str, dict[tuple, list[str]]] = {}
    for op, by_dtype in ops.items():
        for dtype, choice in by_dtype.items():
            found.setdefault(dtype, {}).setdefault((choice["runs"], choice["why"]), []).append(op)
    return found
