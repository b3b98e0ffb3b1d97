"""The CUDA side of an upload without CUDA: cast.cu's own functions, compiled as plain C, on memory of the host."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpukernels.cast
from gpukernels.cast.upload import COUNTERS

COMPILER = shutil.which("cc")
SOURCE = Path(gpukernels.cast.__file__).with_name("cast.cu")

# What a launch does, one thread after the other. `blocks` and the arguments are those of the kernels.
_LAUNCH = """
static void add_up(struct losses lost, unsigned long long* counters) {
    counters[0] += lost.nonfinite, counters[1] += lost.overflowed, counters[2] += lost.underflowed;
    counters[3] += lost.subnormal;
    if (lost.error > counters[4]) counters[4] = lost.error;
}

void cast_flat(long long blocks, const source_t* source, target_t* out, long long count, long long wide,
               unsigned long long* counters) {
    for (long long first = 0; first < blocks * THREADS; first++) {
        struct losses lost = {0, 0, 0, 0, 0};
        cast_in_order(source, out, count, wide, first, blocks * THREADS, &lost);
        add_up(lost, counters);
    }
}

void cast_transposed(long long blocks, const source_t* source, target_t* out, long long rows, long long columns,
                     long long stride, long long wide_source, long long wide_out, unsigned long long* counters) {
    static target_t tile[TILE * PITCH];
    long long down = (rows + TILE - 1) / TILE, tiles = down * ((columns + TILE - 1) / TILE);
    for (long long block = 0; block < blocks; block++)
        for (long long each = block; each < tiles; each += blocks) {
            long long row = each % down * TILE, column = each / down * TILE;
            struct losses lost = {0, 0, 0, 0, 0};
            for (int thread = 0; thread < THREADS; thread++)
                load_tile(source, rows, columns, row, column, wide_source, thread, tile, &lost);
            for (int thread = 0; thread < THREADS; thread++)
                store_tile(tile, rows, columns, row, column, wide_out, thread, out, stride);
            add_up(lost, counters);
        }
}
"""


@functools.cache
def library(source: int, target: int) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        text, built = Path(folder) / "cast.c", Path(folder) / "cast.so"
        text.write_text(f'#include "{SOURCE}"\n{_LAUNCH}')
        # Where a pointer is no multiple of 16, the vector moves of -O2 fault as a GPU's would.
        options = ["-O2", "-fno-strict-aliasing", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"]
        options += ["-shared", "-fPIC", f"-DSOURCE={source}", f"-DTARGET={target}"]
        subprocess.run([COMPILER, *options, "-o", built, text], check=True)
        return ctypes.CDLL(str(built))


class Twin:
    """`gpukernels.cast.upload.Side` on the host. Copies wait, as they may: until somebody asks, or a kernel reads.

    Attributes:
        happened: what was asked for, in order, and when the host waited.
    """

    def __init__(self):
        self.happened: list[str] = []
        self._memory: dict[int, np.ndarray] = {}
        self._pinned: list[int] = []
        self._pending: dict[int, tuple[np.ndarray, int]] = {}

    def pinned(self, nbytes: int) -> np.ndarray:
        memory = np.full(nbytes, 0xFF, np.uint8)
        self._pinned.append(memory.ctypes.data)
        return memory

    def staging(self, nbytes: int) -> int:
        store = np.full(nbytes + 64, 0xFF, np.uint8)
        memory = store[-store.ctypes.data % 64 :][:nbytes]
        self._memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def counters(self, rows: int) -> int:
        self._counters = np.zeros((rows, COUNTERS), np.int64)
        return self._counters.ctypes.data

    def copy(self, source: np.ndarray, target: int) -> Callable[[], None]:
        number = self._pinned.index(source.ctypes.data)
        self.happened.append(f"copy {number}")
        self._pending[number] = source, target

        def wait() -> None:
            self.happened.append(f"wait {number}")
            self._finish(number)

        return wait

    def launch(self, kernel: str, codes: tuple[int, int], blocks: int, arguments: tuple[int, ...]) -> None:
        assert blocks > 0
        self.happened.append("launch")
        for number in list(self._pending):
            self._finish(number)
        self.run(kernel, codes, blocks, arguments)
        # What a later kernel read without a copy of its own would show.
        self._memory[arguments[0]][:] = 0xFF

    def run(self, kernel: str, codes: tuple[int, int], blocks: int, arguments: tuple[int, ...]) -> None:
        getattr(library(*codes), kernel)(*map(ctypes.c_longlong, (blocks, *arguments)))

    def address(self, tensor: Any) -> int:
        return tensor.ctypes.data

    def read_counters(self) -> np.ndarray:
        assert not self._pending
        return self._counters

    def _finish(self, number: int) -> None:
        if number in self._pending:
            source, target = self._pending.pop(number)
            self._memory[target][: source.size] = source
