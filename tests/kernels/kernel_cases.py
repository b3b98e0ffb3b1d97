"""What the kernel tests share: where they run, how inputs lie in memory, and how gradients are judged."""

import os

import torch
from truth import Kind

from gpukernels.kernels.device import INTERPRETING
from gpukernels.verify.compare import backward
from gpukernels.verify.layouts import LAYOUTS

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
#: EMULATE=90: the kernels as they are compiled for this capability, emulated on the CPU (see `gpukernels.emulator`).
EMULATE = int(os.environ.get("EMULATE") or 0)
RUNNABLE = INTERPRETING or DEVICE == "cuda" or EMULATE

HALF, BRAIN, SINGLE = (Kind("torch", dtype, DEVICE) for dtype in ("float16", "bfloat16", "float32"))
KINDS = [HALF, BRAIN, SINGLE]
#: For kernels with a product: the interpreter of Triton 3.6 multiplies bfloat16 as integers.
DOT_KINDS = [HALF, SINGLE] if INTERPRETING else KINDS


if INTERPRETING:
    import triton.language as tl

    from gpukernels.verify.interpreter import adapt

    adapt()

    # Programs run one after the other anyway, and wait for nothing.
    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda _semantic=None: None


def ids(kind: Kind) -> str:
    return kind.dtype


def check_gradients(op: str, arrays: dict, *, layout: str = "contiguous", **options) -> None:
    """The gradients of every floating-point array are torch's of the plain op in float64, within the bound.

    Args:
        arrays: the op's arguments. The upstream gradients are drawn here, in the results' dtypes.
        layout: how the upstream gradients lie in memory.
    """
    for each in backward(op, arrays, lay=LAYOUTS[layout], **options):
        worst = each.errors().max(initial=0)
        assert worst <= 1, f"{op}: {each.what} is off by {worst} times the bound"


def but_for_rounding(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether results of two binaries are one: the compiler fuses other products and sums in each."""
    x, y = x.detach(), y.detach()
    most = 4 * torch.finfo(x.dtype).eps * float(y.abs().max())
    return x.shape == y.shape and x.dtype == y.dtype and float((x.double() - y.double()).abs().max()) <= most
