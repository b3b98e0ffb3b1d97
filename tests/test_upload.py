"""Checkpoint bytes to a GPU, without one: buffers, order and places, by the kernels' own C; NumPy is the judge."""

import numpy as np
import pytest
from cuda_twin import COMPILER, SOURCE, Twin
from test_cast import samples

from gpukernels.cast import FORMATS, Losses, cast, count_losses, round_to
from gpukernels.cast.host import widened
from gpukernels.cast.upload import CODES, Upload, parts
from gpukernels.compile_report import CHIPS, compile_cuda

DTYPES = ("float32", "float16", "bfloat16")
needs_c = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


def reader(source: np.ndarray):
    """What fills memory with the bytes of `source` in order."""
    data, position = source.tobytes(), 0

    def read(memory: memoryview) -> None:
        nonlocal position
        memory[:] = data[position : position + len(memory)]
        position += len(memory)

    return read


def wanted(source: np.ndarray, format: str, dtype: str) -> np.ndarray:
    """The parameter's bits, in float32 for NaN's sake; bfloat16 as float32."""
    if dtype != "bfloat16":
        out = np.empty(source.shape, dtype)
        cast(source, format, out)
        return out
    out = widened(np.ascontiguousarray(source), format).copy()
    round_to(out, dtype)
    return out


def uploaded(
    sources: list, format: str, dtype: str, nbytes: int, offset: int = 0, side: Twin | None = None
) -> tuple[list, list, Twin]:
    """Each (array, transposed) on its way; what arrives between guard bands, the losses, and the side."""
    twin = side or Twin()
    upload, results = Upload(twin, len(sources), dtype=dtype, nbytes=nbytes), []
    for source, transposed in sources:
        shape = source.shape[::-1] if transposed else source.shape
        element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        band = 128 // element.itemsize
        store = np.full(source.size + 3 * band, 7, element)
        start = -store.ctypes.data % 128 // element.itemsize + band // 2 + offset
        out = store[start : start + source.size].reshape(shape)
        upload.add(reader(source), format, source.shape, out, transposed=transposed)
        results.append((store, start, out))
    losses = upload.finish()
    for store, start, out in results:
        assert (store[:start] == 7).all()
        assert (store[start + out.size :] == 7).all()
    outs = [widened(out, "BF16") if dtype == "bfloat16" else out for _, _, out in results]
    return outs, losses, twin


@needs_c
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_kind_of_number_arrives_and_is_counted_as_numpys(format, dtype, transposed):
    source = samples(format)
    source = source[: source.size // 96 * 96].reshape(-1, 96)
    (out,), (losses,), _ = uploaded([(source, transposed)], format, dtype, 1 << 16)
    np.testing.assert_array_equal(out.T if transposed else out, wanted(source, format, dtype))
    assert losses == count_losses(source, format, dtype)


SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (63, 65), (64, 64), (65, 63), (130, 72), (72, 130), (3, 500), (500, 3)]


@needs_c
@pytest.mark.parametrize("nbytes", [64, 96, 1000, 1024, 4096, 1 << 20])
@pytest.mark.parametrize(("format", "dtype"), [("F32", "float16"), ("F16", "float32"), ("BF16", "bfloat16")])
@pytest.mark.parametrize("offset", [0, 3])
def test_shapes_that_no_buffer_or_tile_divides(nbytes, format, dtype, offset):
    random = np.random.default_rng(0)
    sources = []
    for shape in SHAPES:
        values = random.standard_normal(shape, np.float32)
        values = values.view(np.uint32) >> 16 if format == "BF16" else values
        sources += [(values.astype(FORMATS[format]), transposed) for transposed in (False, True)]
    outs, losses, twin = uploaded(sources, format, dtype, nbytes, offset)
    for (source, transposed), out, lost in zip(sources, outs, losses, strict=True):
        np.testing.assert_array_equal(out.T if transposed else out, wanted(source, format, dtype))
        assert lost == count_losses(source, format, dtype)
    # The buffers take turns, and the host waits for one only before it writes over it.
    copies = [each for each in twin.happened if each.startswith("copy")]
    assert copies == [f"copy {number % 2}" for number in range(len(copies))]
    firsts = [each for each in twin.happened if each != "launch"]
    assert firsts == ["copy 0", "copy 1", *(f"{w} {n % 2}" for n in range(len(copies) - 2) for w in ("wait", "copy"))]


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (0, 5), (5, 0), (1, 100_003), (4099, 17)])
@pytest.mark.parametrize("limit", [16, 250, 4096])
def test_parts_cover_a_tensor_in_the_order_of_its_file(rows, columns, limit):
    place = 0
    for part in parts(rows, columns, limit):
        assert 0 < part.rows * part.columns <= limit
        assert part.row * columns + part.column == place
        assert part.columns == columns or part.rows == 1
        place += part.rows * part.columns
    assert place == rows * columns


@needs_c
def test_tensors_without_values_and_a_reader_that_fails():
    empty = np.empty((0, 8), np.float32)
    _, losses, twin = uploaded([(empty, False), (empty, True), (empty.T, True)], "F32", "float16", 256)
    assert losses == [Losses()] * 3
    assert twin.happened == []

    def read(memory: memoryview) -> None:
        raise EOFError("ended")

    upload = Upload(Twin(), 1, dtype="float16", nbytes=256)
    with pytest.raises(EOFError, match="ended"):
        upload.add(read, "F32", (2, 3), np.empty((2, 3), np.float16), transposed=False)


PAIRS = [(90, format, dtype) for format in FORMATS for dtype in DTYPES]
PAIRS += [(capability, "F32", "float16") for capability in CHIPS if capability != 90]


@pytest.mark.parametrize(("capability", "format", "dtype"), PAIRS)
def test_the_kernels_compile_without_spills_and_move_16_bytes(capability, format, dtype):
    options = (f"-DSOURCE={CODES[format]}", f"-DTARGET={CODES[dtype]}")
    for kernel in ("cast_flat", "cast_transposed"):
        compiled = compile_cuda(SOURCE.read_text(), kernel, capability, options)
        assert compiled.spilled_bytes == 0
        assert compiled.registers <= 64  # four blocks of 256 threads at a time
        assert compiled.count("LDG.E.128") >= 1 + (format == "F32")
        assert compiled.count("STG.E.128") >= 1 + (dtype == "float32")
        assert compiled.shared_memory <= 20_000
