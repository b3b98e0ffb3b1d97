"""What the kernel tests share: where they run, how inputs lie in memory, and how gradients are judged."""

from collections.abc import Callable

import numpy as np
import torch
from truth import UNIT, Kind, bound, host

import gpukernels
from gpukernels import torch_ops
from gpukernels.kernels.device import INTERPRETING

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
RUNNABLE = INTERPRETING or DEVICE == "cuda"

HALF, BRAIN, SINGLE = (Kind("torch", dtype, DEVICE) for dtype in ("float16", "bfloat16", "float32"))
KINDS = [HALF, BRAIN, SINGLE]
#: For kernels with a product: the interpreter of Triton 3.6 multiplies bfloat16 as integers.
DOT_KINDS = [HALF, SINGLE] if INTERPRETING else KINDS


def ids(kind: Kind) -> str:
    return kind.dtype


def _sliced(x):
    wide = x.new_full((*[2 * n for n in x.shape[:-1]], x.shape[-1] + 8), torch.nan)
    view = wide[(*[slice(0, 2 * n, 2) for n in x.shape[:-1]], slice(8, None))]
    return view.copy_(x)


def _offset(x):
    return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


#: The same values, otherwise in memory. What lies between them is NaN.
LAYOUTS: dict[str, Callable] = {
    "contiguous": lambda x: x,
    "sliced": _sliced,
    "offset": _offset,
    "transposed": _transposed,
}


def check_gradients(op: str, arrays: dict, magnitudes: Callable, *, layout: str = "contiguous", **options) -> None:
    """The gradients of every floating-point array are torch's of the plain op in float64, within the bound.

    Args:
        arrays: the op's arguments. The upstream gradients are drawn here, in the results' dtypes.
        magnitudes: of the float64 `arrays` and the upstream gradients, as keyword arguments by the
            arrays' names and as a list: {name: (magnitude, length of the sum)}; see `truth.bound`.
        layout: how the upstream gradients lie in memory.
    """
    leaves = {
        name: x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in arrays.items()
    }
    wanted = [name for name, x in leaves.items() if x is not None and x.requires_grad]
    wide = {
        name: x.detach().double().requires_grad_(name in wanted) if name in wanted else x for name, x in leaves.items()
    }

    results = _tuple(getattr(gpukernels, op)(**leaves, **options))
    kinds = [Kind("torch", str(result.dtype).removeprefix("torch."), DEVICE) for result in results]
    douts = [
        kind.draw(*result.shape, seed=100 + i) for i, (kind, result) in enumerate(zip(kinds, results, strict=True))
    ]
    before = [dout.clone() for dout in douts]
    douts = [LAYOUTS[layout](dout) if dout.ndim > 1 else dout for dout in douts]
    found = torch.autograd.grad(results, [leaves[name] for name in wanted], douts)
    for dout, old in zip(douts, before, strict=True):
        assert torch.equal(dout, old), f"{op} changed an upstream gradient"
    truths = torch.autograd.grad(
        _tuple(getattr(torch_ops, op)(**wide, **options)),
        [wide[name] for name in wanted],
        [dout.double() for dout in before],
    )
    # What is rounded on the way is rounded to the dtype of some array.
    dtypes = {str(leaves[name].dtype).removeprefix("torch.") for name in wanted}
    coarsest = max(dtypes, key=UNIT.__getitem__)
    sizes = magnitudes(
        **{name: None if x is None else host(x) for name, x in wide.items()}, douts=[host(dout) for dout in before]
    )
    for name, gradient, truth in zip(wanted, found, truths, strict=True):
        assert gradient.dtype == leaves[name].dtype
        assert gradient.shape == leaves[name].shape
        magnitude, length = sizes[name]
        limit = bound(coarsest, length, magnitude)
        error = np.abs(host(gradient) - host(truth))
        assert (error <= limit).all(), f"d{name} is off by {np.nanmax(error / limit)} times the bound"


def _tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)
