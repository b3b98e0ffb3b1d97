"""Which implementation runs, and the checks that several ops share.

Every message names the op, the argument, what was wanted and what came."""

import functools
import importlib.util
import os
import sys
from types import ModuleType
from typing import TypeVar

import numpy as np

from gpukernels import numpy_ops
from gpukernels.numbers import finite

Array = TypeVar("Array")

#: Activations of `linear` and `norm_linear`: `gelu` is the exact one (erf), `gelu_new` the tanh form.
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "tanh")

FLOATS = {"float16", "bfloat16", "float32", "float64"}

# As Triton reads it; Triton itself is not imported before a tensor needs it.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

#: Kinds of devices whose tensors get kernels. Those without data ("meta") go the way of CUDA's: shapes are what is
#: asked, and launches can be recorded. `gpukernels.emulator` adds "cpu" for a while.
kernel_devices = {"cuda", "meta", "cpu"} if _INTERPRETING else {"cuda", "meta"}
if importlib.util.find_spec("triton") is None:  # torch for Windows, for one, comes without it
    kernel_devices = set()

_NUMPY, _NUMPY_OR_NONE = {np.ndarray}, {np.ndarray, type(None)}


def implementation(op: str, required: dict, **optional) -> ModuleType:
    """The module that runs `op` for these arrays; an optional one may be None.

    NumPy arrays: `numpy_ops`. CUDA tensors of up to 32 bits, where Triton is installed: its kernels,
    `library`; CPU tensors too where Triton interprets, which is its own switch. Every other tensor:
    `torch_ops`. Arrays of one other library that can be shared (CuPy's): `interop`.
    """
    # Sets of types first: a decode step asks this seventy times a token.
    if set(map(type, required.values())) == _NUMPY and set(map(type, optional.values())) <= _NUMPY_OR_NONE:
        return numpy_ops
    for name, array in required.items():
        if array is None:
            raise TypeError(f"{op}: {name} must be an array, got None")
    given = required | {name: array for name, array in optional.items() if array is not None}
    if all(isinstance(array, np.ndarray) for array in given.values()):
        return numpy_ops
    # A torch tensor can only be here if its owner has imported torch.
    torch = sys.modules.get("torch")
    if torch is not None and all(isinstance(array, torch.Tensor) for array in given.values()):
        devices = {array.device for array in given.values()}
        if len(devices) > 1:
            where = ", ".join(f"{name} on {array.device}" for name, array in given.items())
            raise ValueError(f"{op}: the arrays must be on one device, got {where}")
        wide = torch.float64 in [array.dtype for array in given.values()]
        return _torch_side(devices.pop().type, wide)
    libraries = {type(array).__module__.partition(".")[0] for array in given.values()}
    if len(libraries) == 1 and all(map(shareable, given.values())):
        from gpukernels import interop

        return interop
    kinds = ", ".join(f"{name} {type(array).__module__}.{type(array).__name__}" for name, array in given.items())
    raise TypeError(f"{op}: the arrays must be all numpy.ndarray, all torch.Tensor or all of CuPy, got {kinds}")


def _torch_side(device: str, wide: bool) -> ModuleType:
    """What runs tensors on this kind of device; wide: one of them has 64 bits."""
    if device in kernel_devices and not wide:
        from gpukernels import library

        return library
    from gpukernels import torch_ops

    return torch_ops


def shareable(array) -> bool:
    """Whether another library can look at this array's memory."""
    return hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__")


def dtype_name(dtype) -> str:
    return _numpy_name(dtype) if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


@functools.cache  # NumPy takes a microsecond to say it
def _numpy_name(dtype: np.dtype) -> str:
    return str(dtype)


def shape(array) -> str:
    return str(tuple(array.shape))


def check_floats(op: str, **arrays) -> None:
    for name, array in arrays.items():
        if array is not None and dtype_name(array.dtype) not in FLOATS:
            raise TypeError(f"{op}: {name} must be a floating-point array, got {dtype_name(array.dtype)}")


def check_integers(op: str, name: str, array) -> None:
    if dtype_name(array.dtype) not in ("int32", "int64"):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {dtype_name(array.dtype)}")


def check_shape(op: str, name: str, array, want: tuple, why: str) -> None:
    if tuple(array.shape) != want:
        raise ValueError(f"{op}: {name} must be {want} {why}, got {shape(array)}")


def check_written(op: str, name: str, array, *, whole: bool = False) -> None:
    """What an op writes in place must not be copied on the way: neighbours in the last dimension, or `whole`.

    NumPy would copy nothing, and refuses what tensors do. An array of another library (CuPy's has no `stride`) is
    asked as the tensor that it becomes.
    """
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise ValueError(f"{op}: {name} is written, got a read-only array")
        together = array.flags.c_contiguous if whole else array.strides[-1] == array.itemsize or not array.size
    elif hasattr(array, "is_contiguous"):
        together = array.is_contiguous() if whole else array.stride(-1) == 1 or not array.numel()
    else:
        return
    if not together:
        numpy = isinstance(array, np.ndarray)
        strides = tuple(stride // array.itemsize for stride in array.strides) if numpy else tuple(array.stride())
        what = "be contiguous" if whole else "have a contiguous last dimension"
        raise ValueError(f"{op}: {name} is written and must {what}, got the strides {strides}")


def check_scalar(op: str, name: str, array, like) -> None:
    """One number in an array, of the dtype that `like` is computed in."""
    want = "float64" if dtype_name(like.dtype) == "float64" else "float32"
    if dtype_name(array.dtype) != want:
        raise TypeError(f"{op}: {name} must be {want}, got {dtype_name(array.dtype)}")
    if tuple(array.shape) not in ((), (1,)):
        raise ValueError(f"{op}: {name} must be () or (1,), got {shape(array)}")


def check_no_gradient(op: str, **arrays) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in arrays.items():
        if getattr(array, "requires_grad", False):
            raise ValueError(f"{op}: {name} must not require a gradient, which this op has not; use torch.no_grad()")


def check_number(op: str, name: str, number, *, most: float | None = None) -> None:
    """An option that is 0 or more, up to `most`."""
    if not (finite(number) and number >= 0 and (most is None or number <= most)):
        want = "0 or more" if most is None else f"0 to {most}"
        raise ValueError(f"{op}: {name} must be a number, {want}, got {number!r}")


def check_norm(op: str, x, weight, bias, eps: float, weight_name: str, bias_name: str) -> None:
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be (..., C) with C of 1 or more, got {shape(x)}")
    for name, array in ((weight_name, weight), (bias_name, bias)):
        if array is not None:
            check_shape(op, name, array, (x.shape[-1],), "to match x")
    check_number(op, "eps", eps)


def check_product(op: str, x, weight, bias, activation: str | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must be (N, K), got {shape(weight)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x must be (..., {weight.shape[1]}) to match weight {shape(weight)}, got {shape(x)}")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "to match weight")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, or None, got {activation!r}")
