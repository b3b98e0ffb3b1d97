"""From a file into tensors on a GPU: two pinned buffers in turn, cast on the device, no copy in between.

    read -> pinned buffer 0 or 1 -> staging buffer on the device -> kernel (cast.cu) -> the tensor itself

The host reads one buffer's worth while the other is being copied; it waits for a copy only before it writes
over the buffer that the copy reads. Copies and kernels are in one stream, the caller's, so one staging buffer
is enough: the next copy into it starts when the kernel that reads it has ended. The kernel takes a thirtieth
of the copy's time or less (memory of terabytes a second behind a bus of some tens of gigabytes), so nothing
is gained by letting the two overlap.

Memory: two buffers on the host, one on the device, and 40 bytes for each tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpukernels.cast.host import FORMATS
from gpukernels.cast.losses import Losses

BUFFER = 16 * 2**20  # bytes

#: As cast.cu numbers the formats, of files and of parameters.
CODES = {"F32": 0, "F16": 1, "BF16": 2, "float32": 0, "float16": 1, "bfloat16": 2}
# As in cast.cu.
COUNTERS, THREADS = 5, 256
_WIDE, _TILE = 8, 64
_MOST_BLOCKS = 1024  # more than run at a time; each takes several parts of the work


class Side(Protocol):
    """What uploading needs of CUDA. `gpukernels.cast.device` has it; a test's stand-in needs no GPU."""

    def pinned(self, nbytes: int) -> np.ndarray:
        """Bytes of the host that the device can copy from."""

    def staging(self, nbytes: int) -> int:
        """The address of so many bytes on the device, a multiple of 16, which live as long as this object."""

    def counters(self, rows: int) -> int:
        """The address of zeros (rows, COUNTERS), int64, on the device."""

    def copy(self, source: np.ndarray, target: int) -> Callable[[], None]:
        """Starts copying pinned bytes to a staging address; what comes back waits until it has read them."""

    def launch(self, kernel: str, codes: tuple[int, int], blocks: int, arguments: tuple[int, ...]) -> None:
        """Starts a kernel of cast.cu, compiled for these codes of SOURCE and TARGET."""

    def address(self, tensor: Any) -> int:
        """Where a tensor's first element lies."""

    def read_counters(self) -> np.ndarray:
        """Waits for everything; what has been counted, (rows, COUNTERS)."""


class Part(NamedTuple):
    """A rectangle of a stored tensor whose bytes lie together in the file."""

    row: int
    rows: int
    column: int
    columns: int


class Upload:
    """Tensors one after the other, each into its place; `finish` waits, and says what the casts lost."""

    def __init__(self, side: Side, tensors: int, *, dtype: str, nbytes: int = BUFFER):
        """dtype: of every `out`: "float32", "float16" or "bfloat16"."""
        self._side, self._dtype = side, dtype
        self._nbytes = nbytes
        self._pinned = [side.pinned(nbytes) for _ in range(2)]
        self._copied: list[Callable[[], None] | None] = [None, None]
        self._turn = 0
        self._staging = side.staging(nbytes)
        self._counters = side.counters(tensors)
        self._sizes: list[int] = []

    def add(
        self, read: Callable[[memoryview], None], format: str, shape: tuple[int, ...], out: Any, *, transposed: bool
    ) -> None:
        """Reads one tensor and starts casting it into `out`.

        Args:
            read: fills the memory that it is given with the tensor's next bytes.
            format: of the file, "F32", "F16" or "BF16".
            shape: of the file.
            out: contiguous, of that shape, or of its reverse where `transposed`.
        """
        counters = self._counters + 8 * COUNTERS * len(self._sizes)
        start, codes = self._side.address(out), (CODES[format], CODES[self._dtype])
        itemsize, width = FORMATS[format].itemsize, 4 if self._dtype == "float32" else 2
        size = int(np.prod(shape, dtype=np.int64))
        rows, columns = shape if transposed else (1, size)
        for part in parts(rows, columns, self._nbytes // itemsize):
            self._next(read, part.rows * part.columns * itemsize)
            first = part.column * rows + part.row if transposed else part.column
            place = start + first * width
            aligned = int(place % 16 == 0)
            if transposed:
                down, across = -(-part.rows // _TILE), -(-part.columns // _TILE)
                wide_source, wide_out = int(part.columns % _WIDE == 0), int(aligned and rows % _WIDE == 0)
                arguments = (part.rows, part.columns, rows, wide_source, wide_out)
                self._launch("cast_transposed", codes, down * across, place, arguments, counters)
            else:
                blocks = -(-part.columns // (THREADS * _WIDE))
                self._launch("cast_flat", codes, blocks, place, (part.columns, aligned), counters)
        self._sizes.append(size)

    def finish(self) -> list[Losses]:
        """Waits for the last tensor; what each cast lost, in order."""
        counted = self._side.read_counters()[: len(self._sizes)]
        errors = counted[:, 4].astype(np.uint32).view(np.float32)
        return [
            Losses(size, *map(int, row[:4]), error=float(error))
            for size, row, error in zip(self._sizes, counted, errors, strict=True)
        ]

    def _next(self, read: Callable[[memoryview], None], nbytes: int) -> None:
        """The tensor's next bytes, on their way to the staging buffer."""
        turn, self._turn = self._turn, 1 - self._turn
        if self._copied[turn] is not None:
            self._copied[turn]()
        buffer = self._pinned[turn][:nbytes]
        read(memoryview(buffer))
        self._copied[turn] = self._side.copy(buffer, self._staging)

    def _launch(
        self, kernel: str, codes: tuple[int, int], blocks: int, out: int, sizes: tuple[int, ...], counters: int
    ) -> None:
        self._side.launch(kernel, codes, min(blocks, _MOST_BLOCKS), (self._staging, out, *sizes, counters))


def parts(rows: int, columns: int, limit: int) -> Iterator[Part]:
    """A tensor in the order of its file, in parts of at most `limit` elements: whole rows, or parts of one.

    Where there is room, a part's first row or column is a multiple of `_TILE`, so that no later part has to do
    with less than 16 bytes at a time.
    """
    if columns <= limit:
        step = limit // max(1, columns)
        step = step // _TILE * _TILE or step // _WIDE * _WIDE or step
        for row in range(0, rows if columns else 0, step):
            yield Part(row, min(step, rows - row), 0, columns)
    else:
        step = limit // _TILE * _TILE or limit
        for row in range(rows):
            for column in range(0, columns, step):
                yield Part(row, 1, column, min(step, columns - column))
