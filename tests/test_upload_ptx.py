"""Checkpoint bytes to a GPU by the kernels as NVRTC compiles them, emulated: warps, barriers and atomics too."""

import functools

import numpy as np
import pytest
from cuda_twin import SOURCE, Twin
from test_cast import samples
from test_upload import DTYPES, SHAPES, uploaded, wanted

from gpukernels.cast import FORMATS, count_losses
from gpukernels.cast.upload import THREADS
from gpukernels.compile_report.cuda_source import cuda_ptx
from gpukernels.emulator.code import Code
from gpukernels.emulator.launching import execute
from gpukernels.emulator.ptx import parse

pytest.importorskip("cupy")


@functools.cache
def compiled(kernel: str, source: int, target: int) -> Code:
    options = (f"-DSOURCE={source}", f"-DTARGET={target}")
    function, text = cuda_ptx(SOURCE.read_text(encoding="utf-8"), kernel, 90, options)
    return Code(parse(text, function))


class Emulated(Twin):
    """As `Twin`, but that kernels run as compiled for an H100. They may touch what they are given, and no more."""

    def __init__(self):
        super().__init__()
        self._outs: dict[int, int] = {}

    def address(self, tensor):
        self._outs[tensor.ctypes.data] = tensor.nbytes
        return super().address(tensor)

    def run(self, kernel, codes, blocks, arguments):
        ranges = [(start, memory.nbytes) for start, memory in self._memory.items()]
        ranges += [*self._outs.items(), (self._counters.ctypes.data, self._counters.nbytes)]
        parameters = [np.uint64(each) for each in arguments]
        execute(compiled(kernel, *codes), (blocks, 1, 1), THREADS, parameters, ranges)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_kind_of_number_arrives_and_is_counted(format, dtype, transposed):
    source = samples(format)
    source = source[:: max(1, source.size // 9000)]
    source = source[: source.size // 96 * 96].reshape(-1, 96)
    (out,), (losses,), _ = uploaded([(source, transposed)], format, dtype, 1 << 14, side=Emulated())
    np.testing.assert_array_equal(out.T if transposed else out, wanted(source, format, dtype))
    assert losses == count_losses(source, format, dtype)


@pytest.mark.parametrize("nbytes", [64, 1000, 1 << 16])
@pytest.mark.parametrize("offset", [0, 3])
def test_shapes_that_no_buffer_or_tile_divides(nbytes, offset):
    random = np.random.default_rng(0)
    few = SHAPES if nbytes > 64 else SHAPES[:5]
    sources = [(random.standard_normal(shape, np.float32), turned) for shape in few for turned in (False, True)]
    outs, losses, _ = uploaded(sources, "F32", "float16", nbytes, offset, side=Emulated())
    for (source, transposed), out, lost in zip(sources, outs, losses, strict=True):
        np.testing.assert_array_equal(out.T if transposed else out, wanted(source, "F32", "float16"))
        assert lost == count_losses(source, "F32", "float16")
