"""Arrays of other libraries: a small one made here that speaks DLPack, and CuPy's where there is a GPU."""

import inspect
import sys
import types

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

import gpukernels
from gpukernels import interop, ops


class Array:
    """A library's own array, on the CPU, that shares its memory by DLPack and can be made from it."""

    def __init__(self, tensor):
        self.tensor = tensor

    shape = property(lambda self: tuple(self.tensor.shape))
    ndim = property(lambda self: self.tensor.ndim)
    dtype = property(lambda self: np.dtype(str(self.tensor.dtype).removeprefix("torch.")))

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda capsule: Array(torch.from_dlpack(capsule)))


Array.__module__ = "otherlibrary.core"


def draw(*shape, dtype=np.float32):
    return Array(torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(dtype)))


def test_results_are_of_the_callers_kind_and_those_of_torch():
    x, weight, residual = draw(3, 8), draw(8), draw(3, 8)
    y, s = gpukernels.layer_norm(x, weight, residual=residual, eps=1e-3)
    want = gpukernels.layer_norm(x.tensor, weight.tensor, residual=residual.tensor, eps=1e-3)
    assert isinstance(y, Array)
    assert isinstance(s, Array)
    assert torch.equal(y.tensor, want[0])
    assert torch.equal(s.tensor, want[1])
    lengths = Array(torch.tensor([5, 2], dtype=torch.int32))
    q, k = draw(2, 1, 2, 4), draw(2, 5, 2, 4)
    out = gpukernels.attention(q, k, v=k, lengths=lengths)
    assert torch.equal(out.tensor, gpukernels.attention(q.tensor, k.tensor, k.tensor, lengths=lengths.tensor))


def test_a_dtype_is_one_of_the_callers_library():
    ids = Array(torch.tensor([2, 0]))
    for dtype in (np.float16, np.dtype("float16")):
        assert gpukernels.embedding(ids, draw(3, 4), dtype=dtype).tensor.dtype == torch.float16


def test_what_is_written_is_written_in_the_callers_memory():
    """The arrays that are written have no `stride` and no `is_contiguous`, as CuPy's have not."""
    keys, values, new = draw(2, 7, 2, 4), draw(2, 7, 2, 4), draw(2, 1, 2, 4)
    gpukernels.cached_attention(new, new, new, keys, values, Array(torch.tensor([3, 7], dtype=torch.int32)))
    assert torch.equal(keys.tensor[[0, 1], [2, 6]], new.tensor[:, 0])
    lengths, x, table = Array(torch.tensor([3, 0], dtype=torch.int32)), draw(2, 1, 4), draw(9, 4)
    tokens = gpukernels.sample_embed(draw(2, 9), lengths=lengths, weight=table, x=x)
    assert lengths.tensor.tolist() == [4, 0]
    assert torch.equal(x.tensor[0, 0], table.tensor[tokens.tensor[0]])
    rate, count = Array(torch.tensor(0.1)), Array(torch.tensor(1))
    parameter, gradient, first, second = (Array(torch.ones(5)) for _ in range(4))
    gpukernels.adamw(parameter, gradient, first, second, step=count, learning_rate=rate)
    assert not torch.equal(parameter.tensor, gradient.tensor)
    strided = Array(keys.tensor.transpose(1, 3).contiguous().transpose(1, 3))
    with pytest.raises(ValueError, match="keys is written and must have a contiguous last dimension"):
        gpukernels.cached_attention(new, new, new, strided, values, Array(torch.tensor([3, 7], dtype=torch.int32)))


def test_nothing_is_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "matmul", lambda a, b: seen.append((a, b)) or a)
    a, b = draw(2, 3), draw(3, 2)
    result = interop.matmul(a, b)
    assert [each.data_ptr() for each in seen[0]] == [a.tensor.data_ptr(), b.tensor.data_ptr()]
    assert result.tensor.data_ptr() == a.tensor.data_ptr()


def test_arrays_of_numpy_and_tensors_go_through():
    x = draw(3, 8).tensor
    for given in (x, x.numpy()):
        found = interop.gelu(given, approximate="none")
        assert type(found) is type(given)
        assert np.array_equal(np.asarray(found), np.asarray(gpukernels.gelu(given, approximate="none")))


def test_errors_speak_of_the_callers_arrays():
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \(8,\) to match x, got \(7,\)"):
        gpukernels.layer_norm(draw(3, 8), draw(7))
    with pytest.raises(TypeError, match=r"must be all numpy.ndarray, all torch.Tensor or all of CuPy, got x otherlib"):
        gpukernels.layer_norm(draw(3, 8), np.ones(8, np.float32))


def test_an_array_without_a_way_back_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(ops, "matmul", lambda a, b: pytest.fail("this was computed"))
    monkeypatch.delattr(Array, "__array_namespace__")
    words = "given back as otherlibrary.core.Array, which has no __array_namespace__, nor otherlibrary a from_dlpack"
    with pytest.raises(TypeError, match=words):
        interop.matmul(draw(2, 3), draw(3, 2))


def test_an_array_that_names_no_namespace_comes_back_through_its_library(monkeypatch):
    """As CuPy's arrays do."""
    namespace = draw(1).__array_namespace__()
    monkeypatch.delattr(Array, "__array_namespace__")
    monkeypatch.setitem(sys.modules, "otherlibrary", namespace)
    a, b = draw(2, 3), draw(3, 2)
    found = gpukernels.matmul(a, b)
    assert isinstance(found, Array)
    assert torch.equal(found.tensor, a.tensor @ b.tensor)


def test_the_way_back_to_cupy():
    cupy = pytest.importorskip("cupy")
    # An array needs a GPU; what is asked of one is its class and its class's module.
    array = type("ndarray", (), {"__module__": cupy.ndarray.__module__})()
    assert interop._way_back(array) is cupy.from_dlpack
    assert all(hasattr(cupy.ndarray, name) for name in ("__dlpack__", "__dlpack_device__", "__cuda_array_interface__"))


def test_every_op_is_there_and_nothing_else():
    assert all(
        callable(getattr(interop, name)) for name in gpukernels.__all__ if inspect.isfunction(getattr(ops, name))
    )
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = interop.softmax


def test_the_callers_stream_is_current_while_an_op_runs(monkeypatch):
    """What the CUDA array interface says of the stream, handed to torch; no GPU is asked."""
    entered = []

    class Stream:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            entered.append(self.what)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: f"{pointer} of {device}")
    a, b = draw(2, 3), draw(3, 2)
    for stream, want in ((None, "default of 0"), (1, "default of 0"), (2, "2 of 0"), (12345, "12345 of 0")):
        monkeypatch.setattr(Array, "__cuda_array_interface__", {"stream": stream}, raising=False)
        gpukernels.matmul(a, b)
        assert entered == [want, "left"]
        entered.clear()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_cupy():
    cupy = pytest.importorskip("cupy")
    x, weight = cupy.random.standard_normal((64, 768)).astype("float16"), cupy.ones(768, "float16")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        slow = cupy.ones((4096, 4096), "float32")
        for _ in range(20):
            slow = slow @ slow * 1e-4  # the stream is still busy when the op is called
        y = gpukernels.layer_norm(x * (slow[0, 0] * 0 + 2), weight)
        assert isinstance(y, cupy.ndarray)
        result = cupy.asnumpy(y, stream=stream)
    stream.synchronize()
    want = gpukernels.layer_norm(cupy.asnumpy(x).astype("float32"), np.ones(768, np.float32))
    np.testing.assert_allclose(result, want, atol=2e-2)
