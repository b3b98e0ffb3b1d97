"""Which implementation runs an op here, and why: what `gpukernels.ops` decides at every call, put into words."""

import importlib.util
from typing import Any, NamedTuple

import numpy as np

from gpukernels import ops
from gpukernels.ops.checks import implementation

DTYPES = ("float16", "bfloat16", "float32", "float64")

#: Ops that have no kernel for wide heads.
_ATTENTION = ("attention", "cached_attention", "decode_attention", "packed_attention")


class Choice(NamedTuple):
    """What runs an op for arrays of one dtype."""

    runs: str | None  # "NumPy", "Triton kernels", "plain torch", or None
    why: str


def choices(device: str | None) -> dict[str, dict[str, Choice]]:
    """By op and dtype, for arrays on a torch device ("cuda", "cpu"), or for NumPy's (None). `uniform` has no dtype."""
    by_dtype = {dtype: _choice(device, dtype) for dtype in DTYPES}
    named = [name for name in ops.__all__ if callable(getattr(ops, name)) and name != "uniform"]
    return {name: {dtype: _of(name, choice) for dtype, choice in by_dtype.items()} for name in named}


def _choice(device: str | None, dtype: str) -> Choice:
    """Asks as an op would, with an empty array."""
    if device is None:
        if dtype == "bfloat16":
            return Choice(None, "NumPy has no bfloat16; use a torch tensor")
        array: Any = np.empty(0, dtype)
    else:
        import torch

        array = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    module = implementation("dispatch", {"array": array}).__name__.rpartition(".")[2]
    if module == "numpy_ops":
        return Choice("NumPy", "the arrays are NumPy's")
    if module == "library":
        where = "CUDA tensors" if device.startswith("cuda") else "TRITON_INTERPRET is set: tensors on the CPU"
        return Choice("Triton kernels", f"{where} of up to 32 bits")
    if importlib.util.find_spec("triton") is None:
        return Choice("plain torch", "Triton is not installed")
    wide = dtype == "float64"
    return Choice("plain torch", "no kernel computes in 64 bits" if wide else f"tensors on the {device.upper()}")


def _of(op: str, choice: Choice) -> Choice:
    if choice.runs != "Triton kernels" or op not in _ATTENTION:
        return choice
    from gpukernels.library.attention import WIDEST

    return choice._replace(why=f"{choice.why}, and heads up to {WIDEST} wide; plain torch runs wider ones")
