"""The CUDA side of `gpukernels.cast.upload`: memory and streams by torch, kernels of cast.cu by CuPy."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

from gpukernels.cast.upload import COUNTERS, THREADS

SOURCE = Path(__file__).with_name("cast.cu")


class Cuda:
    """Everything on the stream that is current for torch, on one device."""

    def __init__(self, device: torch.device):
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.current_stream(self._device)
        self._kept: dict[int, torch.Tensor] = {}

    def pinned(self, nbytes: int) -> np.ndarray:
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._keep(memory)
        return memory.numpy()

    def staging(self, nbytes: int) -> int:
        return self._keep(torch.empty(nbytes, dtype=torch.uint8, device=self._device))

    def counters(self, rows: int) -> int:
        self._counters = torch.zeros((rows, COUNTERS), dtype=torch.int64, device=self._device)
        return self._keep(self._counters)

    def copy(self, source: np.ndarray, target: int) -> Callable[[], None]:
        copied = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._kept[target][: source.size].copy_(self._kept[source.ctypes.data][: source.size], non_blocking=True)
            copied.record()
        return copied.synchronize

    def launch(self, kernel: str, codes: tuple[int, int], blocks: int, arguments: tuple[int, ...]) -> None:
        with cupy.cuda.Device(self._device.index), _for_cupy(self._stream, self._device.index):
            _module(*codes).get_function(kernel)((blocks,), (THREADS,), tuple(map(np.int64, arguments)))

    def address(self, tensor: Any) -> int:
        return tensor.data_ptr()

    def read_counters(self) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            return self._counters.cpu().numpy()

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept[tensor.data_ptr()] = tensor
        return tensor.data_ptr()


@functools.cache
def _module(source: int, target: int) -> cupy.RawModule:
    return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=(f"-DSOURCE={source}", f"-DTARGET={target}"))


def _for_cupy(stream: torch.cuda.Stream, device: int) -> contextlib.AbstractContextManager:
    """torch's stream, as CuPy's current one."""
    if not hasattr(cupy.cuda.Stream, "from_external"):  # before CuPy 14
        return cupy.cuda.ExternalStream(stream.cuda_stream, device)
    return cupy.cuda.Stream.from_external(_Handle(stream))


class _Handle:
    """A torch stream behind the CUDA stream protocol, which torch's own has only in newer releases."""

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream
