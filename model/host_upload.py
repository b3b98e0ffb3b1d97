"""Tensors of a file into arrays by way of the host, on any device: `gpukernels.cast.Upload` without CUDA."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpukernels.cast import FORMATS, Losses, count_losses, is_exact

# Bytes read at a time where they cannot go straight into the parameter: the longest row that a config may
# have (2**20 float32) is as long.
CHUNK = 4 * 2**20


class HostUpload:
    """Each tensor is read straight into its place where it is stored as it is wanted, else a chunk at a time."""

    def __init__(self, cast: Callable[[np.ndarray, str, Any], None], *, dtype: str, audit: str | None = None):
        """
        Args:
            cast: `Device.cast`.
            dtype: of every `out`.
            audit: whose losses are counted, those of exact casts too; default `dtype`'s, of what can lose.
        """
        self._cast, self._dtype, self._audit = cast, dtype, audit
        self._scratch = memoryview(bytearray(CHUNK))
        self._losses: list[Losses] = []

    def add(
        self, read: Callable[[memoryview], None], format: str, shape: tuple[int, ...], out: Any, *, transposed: bool
    ) -> None:
        """See `gpukernels.cast.Upload.add`."""
        stored, out = FORMATS[format], out.T if transposed else out
        if isinstance(out, np.ndarray) and out.dtype == stored and out.flags.c_contiguous:
            read(memoryview(out).cast("B"))
            self._losses.append(self._lost(out, format))
            return
        losses = Losses()
        row = stored.itemsize * (int(np.prod(shape, dtype=np.int64)) // max(1, shape[0]))
        rows = max(1, len(self._scratch) // max(1, row))
        for start in range(0, shape[0], rows):
            part = out[start : start + rows]
            raw = self._scratch[: part.shape[0] * row]
            read(raw)
            values = np.frombuffer(raw, stored)
            self._cast(values, format, part)
            losses += self._lost(values, format)
        self._losses.append(losses)

    def finish(self) -> list[Losses]:
        """What each cast lost, in order."""
        return self._losses

    def _lost(self, values: np.ndarray, format: str) -> Losses:
        if self._audit is None and is_exact(format, self._dtype):
            return Losses(values.size)
        return count_losses(values, format, self._audit or self._dtype)
