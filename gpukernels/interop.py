"""Arrays of other libraries: CuPy's, and whatever speaks DLPack or the CUDA array interface.

The ops run on torch tensors that share the arrays' memory, on the stream that is current for the caller,
and results come back as the caller's type, sharing memory too: nothing is copied and nothing waited for.

    y = gpukernels.layer_norm(x, weight)        # cupy.ndarray in, cupy.ndarray out

`gpukernels.ops` sends such arrays here; `interop.layer_norm` and the others have the public signatures.

DLPack: https://dmlc.github.io/dlpack; the CUDA array interface, version 3, and what its `stream` means:
https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpukernels import ops
from gpukernels.ops.checks import shareable

_LEGACY_DEFAULT_STREAM = 1  # as the CUDA array interface writes it


def __getattr__(name: str) -> Callable:
    if name not in ops.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(_call, getattr(ops, name))


def _call(op: Callable, *arguments: Any, **options: Any) -> Any:
    given = [value for value in (*arguments, *options.values()) if is_foreign(value)]
    if not given:  # all NumPy's, or all tensors: there is nothing to do here
        return op(*arguments, **options)
    back = _way_back(given[0])
    with _callers_stream(given[0]):
        results = op(*map(_to_torch, arguments), **{name: _to_torch(value) for name, value in options.items()})
        if isinstance(results, tuple):
            return tuple(map(back, results))
        return results if results is None else back(results)


def is_foreign(value: Any) -> bool:
    """Whether this is an array of neither NumPy nor torch that can be shared."""
    return not isinstance(value, np.ndarray | np.generic | torch.Tensor) and shareable(value)


def _to_torch(value: Any) -> Any:
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return getattr(torch, np.dtype(value).name)
    if not is_foreign(value):
        return value
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.as_tensor(value, device="cuda")


def _way_back(array: Any) -> Callable[[torch.Tensor], Any]:
    """What turns a tensor into an array of this one's kind; asked before anything is computed."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__().from_dlpack
    module = type(array).__module__
    library = module.partition(".")[0]
    if library in ("numba", "numba_cuda"):
        from numba import cuda

        return cuda.as_cuda_array
    # CuPy's arrays name no namespace (14.2 is the newest); their library has been imported by whoever made one.
    back = getattr(sys.modules.get(library), "from_dlpack", None)
    if back is None:
        raise TypeError(
            f"results cannot be given back as {module}.{type(array).__name__}, which has no __array_namespace__, "
            f"nor {library} a from_dlpack; pass torch.from_dlpack(array)"
        )
    return back


def _callers_stream(array: Any) -> contextlib.AbstractContextManager:
    """Makes the stream that is current for the array's library current for torch."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return contextlib.nullcontext()  # on the CPU; or DLPack's own handshake orders the two streams
    device = array.__dlpack_device__()[1] if hasattr(array, "__dlpack_device__") else torch.cuda.current_device()
    stream = interface.get("stream")
    if stream in (None, _LEGACY_DEFAULT_STREAM):
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))
