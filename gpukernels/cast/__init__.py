"""Casts between the floating-point formats of checkpoints and of parameters, and what they lose.

`host` is NumPy, on the CPU. `losses` says what a cast to fewer bits does to the values: how many overflow,
underflow, become subnormal, and the largest relative error. `upload` brings a file's bytes to a GPU, where the
kernels of `cast.cu` cast, transpose and count; `device` is its CUDA side, and alone imports torch and CuPy.
"""

from typing import Any

from gpukernels.cast.host import FORMATS, WIDENED, cast, round_to, widen_float16
from gpukernels.cast.losses import Losses, count_losses, is_exact
from gpukernels.cast.upload import Upload

__all__ = [
    "FORMATS",
    "WIDENED",
    "Losses",
    "Upload",
    "cast",
    "count_losses",
    "cuda_upload",
    "is_exact",
    "round_to",
    "widen_float16",
]


def cuda_upload(device: Any, tensors: int, *, dtype: str) -> Upload:
    """An `Upload` of so many tensors to a CUDA device (`torch.device`), on torch's current stream there. Needs CuPy."""
    from gpukernels.cast.device import Cuda

    return Upload(Cuda(device), tensors, dtype=dtype)
