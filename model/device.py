"""Where a model's arrays live: NumPy on the CPU, or a torch device. Decided once, while loading.

`device="cpu"` is NumPy and `device=torch.device("cpu")` is plain torch; `"cuda"` is Triton's kernels on an
NVIDIA GPU; `"auto"` is `"cuda"` where there is one. A `Device` makes arrays and moves values in and out; what
is computed with them is the ops' business.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpukernels.cast import Losses, cast, cuda_upload
from model.errors import DeviceError
from model.host_upload import HostUpload

DTYPES = ("float32", "float16", "bfloat16")

#: Bytes of one element.
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


class Upload(Protocol):
    """A file's tensors on their way into arrays; see `gpukernels.cast.Upload`."""

    def add(
        self, read: Callable[[memoryview], None], format: str, shape: tuple[int, ...], out: Any, *, transposed: bool
    ) -> None:
        """Reads a tensor of this shape into `out`, which is of that shape, or of its reverse where `transposed`."""

    def finish(self) -> list[Losses]:
        """Waits for the last one; what each cast lost, in order."""


class Device(Protocol):
    """What loading and decoding need of a place for arrays."""

    name: str

    def activation_dtype(self, dtype: str) -> Any:
        """The dtype that a model with weights of `dtype` computes in."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised array."""

    asynchronous: bool  # what is computed is only started, and runs while the host goes on

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of zeros, in a dtype of the array library, or one by name."""

    def fetch(self, array: Any) -> Callable[[], list[int]]:
        """Starts copying integers (n,) to the host; what comes back waits for them."""

    def indices(self, values: Any) -> Any:
        """Host integers as an int32 array on the device."""

    def assign(self, array: Any, value: Any) -> None:
        """Copies `value`, of the array's kind and shape, into `array`."""

    def cast(self, source: np.ndarray, format: str, out: Any) -> None:
        """Writes checkpoint values into `out`. See `gpukernels.cast`."""

    def upload(self, tensors: int, *, dtype: str, audit: str | None = None) -> Upload:
        """A way for so many tensors of a file into arrays of `dtype`. For `audit` see `HostUpload`."""

    def how_it_loads(self) -> str:
        """One sentence on the way that `upload` takes."""

    def free_bytes(self) -> int | None:
        """Memory of a GPU that can still be had; None on the host, which `model.room` asks."""

    def to_host(self, array: Any) -> np.ndarray:
        """The values as a float32 array on the host."""

    def to_bytes(self, array: Any) -> memoryview:
        """The values' own bytes, in row-major order."""


class NumpyDevice:
    """NumPy arrays. float16 is a format for storage here: what is computed is float32."""

    name = "cpu"
    asynchronous = False

    def activation_dtype(self, dtype: str) -> np.dtype:
        return np.dtype(np.float32)

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def indices(self, values: Any) -> np.ndarray:
        return np.asarray(values, np.int32)

    def fetch(self, array: np.ndarray) -> Callable[[], list[int]]:
        values = array.tolist()
        return lambda: values

    def assign(self, array: np.ndarray, value: np.ndarray) -> None:
        np.copyto(array, value)

    def cast(self, source: np.ndarray, format: str, out: np.ndarray) -> None:
        cast(source, format, out)

    def upload(self, tensors: int, *, dtype: str, audit: str | None = None) -> Upload:
        return HostUpload(self.cast, dtype=dtype, audit=audit)

    def how_it_loads(self) -> str:
        return "read straight into place, or 4 MiB at a time and cast by NumPy"

    def free_bytes(self) -> None:
        return None

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32, copy=False)

    def to_bytes(self, array: np.ndarray) -> memoryview:
        return memoryview(np.ascontiguousarray(array)).cast("B")


class TorchDevice:
    """Tensors on one torch device, computed in the dtype of the weights."""

    def __init__(self, device: Any):
        import torch

        self._torch = torch
        self.device = torch.device(device)
        self.name = str(self.device)
        self.asynchronous = self.device.type == "cuda"
        if self.asynchronous and self.device.index is None:
            # The one that is current now, whichever is current later.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._casts_on_device = self.asynchronous and importlib.util.find_spec("cupy") is not None

    def activation_dtype(self, dtype: str) -> Any:
        return getattr(self._torch, dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        dtype = getattr(self._torch, dtype) if isinstance(dtype, str) else dtype
        return self._torch.zeros(shape, dtype=dtype, device=self.device)

    def indices(self, values: Any) -> Any:
        tensor = self._torch.as_tensor(np.asarray(values, np.int32))
        if self.asynchronous:  # from pinned memory the copy is only started
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self.asynchronous)

    def fetch(self, array: Any) -> Callable[[], list[int]]:
        if not self.asynchronous:
            values = array.tolist()
            return lambda: values
        host = self._torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
        host.copy_(array, non_blocking=True)
        copied = self._torch.cuda.Event()
        copied.record(self._torch.cuda.current_stream(self.device))  # another device may be the current one

        def read() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return read

    def assign(self, array: Any, value: Any) -> None:
        with self._torch.no_grad():
            array.copy_(value)

    def cast(self, source: np.ndarray, format: str, out: Any) -> None:
        torch = self._torch
        if format == "BF16":
            tensor = torch.from_numpy(source.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(source)
        # The raw values travel; the device casts (and transposes, where `out` is a transposed view).
        out.copy_(tensor.to(self.device).reshape(out.shape))

    def upload(self, tensors: int, *, dtype: str, audit: str | None = None) -> Upload:
        if self._casts_on_device and audit in (None, dtype):  # its kernel counts what it does, always
            return cuda_upload(self.device, tensors, dtype=dtype)
        return HostUpload(self.cast, dtype=dtype, audit=audit)

    def how_it_loads(self) -> str:
        if self._casts_on_device:
            return "read into two pinned buffers in turn and cast on the device by CuPy"
        return (
            "read 4 MiB at a time and cast by torch"
            + "; CuPy, which is not installed, would stream" * self.asynchronous
        )

    def free_bytes(self) -> int | None:
        if not self.asynchronous:
            return None
        cuda = self._torch.cuda
        free, _ = cuda.mem_get_info(self.device)
        # What torch keeps of freed tensors is as good as free.
        return free + cuda.memory_reserved(self.device) - cuda.memory_allocated(self.device)

    def to_host(self, array: Any) -> np.ndarray:
        return array.detach().cpu().float().numpy()  # widened where there is more memory

    def to_bytes(self, array: Any) -> memoryview:
        return memoryview(array.detach().contiguous().cpu().view(self._torch.uint8).numpy()).cast("B")


def choose_device(device: Any) -> Device:
    """The `Device` for "cpu", "cuda", "cuda:1", "auto", or a `torch.device`.

    Raises DeviceError for another name, and for "cuda" with the reason why it is not there.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(device, torch.device):
        if device.type == "cuda":
            _require_cuda(device)
        elif device.type != "cpu":
            raise DeviceError(f'device must be a torch.device of type "cpu" or "cuda", got {device!r}')
        return TorchDevice(device)
    if device == "cpu":
        return NumpyDevice()
    if device == "auto":
        return NumpyDevice() if why_no_cuda() else TorchDevice("cuda")
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind == "cuda" and (not index or index.isdecimal()):
        _require_cuda(device)
        return TorchDevice(device)
    raise DeviceError(f'device must be "cpu" (NumPy), "cuda", "auto", or a torch.device, got {device!r}')


def choose_dtype(dtype: Any, device: Device, stored: str | None = None) -> str:
    """The name of the parameters' dtype: `dtype` checked, or for "auto" the device's own choice.

    "auto" is float32 on the CPU; on CUDA float16, or bfloat16 where the checkpoint (`stored`, a
    safetensors dtype) has that.
    """
    cuda = device.name.startswith("cuda")
    if isinstance(dtype, str) and dtype == "auto":
        return "float32" if not cuda else "bfloat16" if stored == "BF16" else "float16"
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    if name not in DTYPES:
        raise DeviceError(f"dtype must be {', '.join(DTYPES)}, or auto, got {dtype!r}")
    if name == "bfloat16" and isinstance(device, NumpyDevice):
        raise DeviceError("dtype bfloat16 needs a torch device: NumPy has no such type; use float16 or float32")
    return name


def sees_gpu() -> bool:
    """Whether the driver sees a GPU; asks nothing of torch, which `why_no_cuda` does then."""
    return bool(_driver_devices())


def why_no_cuda() -> str | None:
    """One sentence on why CUDA cannot be used, or None if it can.

    Asks the driver before it imports torch, which takes a second or more.
    """
    devices = _driver_devices()
    if devices is None:
        return "there is no NVIDIA driver on this machine"
    if devices == 0:
        return "the NVIDIA driver sees no GPU"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'gpukernels[cuda13]' (or cuda12, for an older driver)"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install 'gpukernels[cuda13]' (or cuda12)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the driver: it may be too old"
    return None


def _driver_devices() -> int | None:
    """How many GPUs the CUDA driver sees, or None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _require_cuda(device: Any) -> None:
    reason = why_no_cuda()
    if reason:
        raise DeviceError(f"device {str(device)!r} is not there: {reason}")
    import torch

    index = torch.device(device).index
    if index is not None and index >= torch.cuda.device_count():
        raise DeviceError(f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} GPU(s)")
