"""An op's results and gradients on some device, beside their float64 truths, in units of the bound."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

import gpukernels
from gpukernels import torch_ops
from gpukernels.verify.gradients import GRADIENTS
from gpukernels.verify.truth import TRUTHS, UNIT, Truth, bound

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.7976e308}


class Compared(NamedTuple):
    """One array that an op gave, and what it should have been."""

    what: str  # "y" for a result, "dx" for the gradient of x, or the name of what is changed in place
    found: Any
    value: np.ndarray
    limit: np.ndarray
    dtype: str  # what `found` should have

    def errors(self) -> np.ndarray:
        """Of each element, in units of its bound; infinite where a number is not one, or should not be one."""
        if tuple(self.found.shape) != self.value.shape or dtype_of(self.found) != self.dtype:
            return np.array([np.inf])
        found, value = host(self.found).astype(np.float64), np.asarray(self.value, np.float64)  # bools too
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            error = np.abs(found - value) / self.limit
            same = (found == value) | (np.isnan(found) & np.isnan(value))
            # Where the truth comes near the format's largest number, infinity is as right.
            largest = _LARGEST.get(self.dtype, np.inf)
            beyond = np.isinf(found) & (np.sign(found) == np.sign(value)) & (abs(value) + self.limit >= largest)
            return np.where(same | beyond, 0.0, np.where(np.isnan(error), np.inf, error))


def host(array: Any) -> np.ndarray:
    """The values as NumPy has them, floats as float64, in memory of their own."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.double().numpy() if array.is_floating_point() else array.numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array.copy()


def on_host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as NumPy's arrays of the same dtypes, strides and all; bfloat16, which it has not, as float32."""
    return {
        name: x if isinstance(x, np.ndarray) else (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
        for name, x in arrays.items()
    }


def copied(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the same values and strides, for an op that writes."""
    return {name: x.copy(order="K") if isinstance(x, np.ndarray) else x.clone() for name, x in arrays.items()}


def dtype_of(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def forward(
    op: str, arrays: Mapping[str, Any], *, result: str | None = None, **options: Any
) -> Iterator[Compared]:  # fmt: skip
    """The results of an op; result: their dtype, if it is not that of the first array."""
    before = {name: host(array) for name, array in arrays.items()}
    results, truths = tuple_of(getattr(gpukernels, op)(**arrays, **options)), TRUTHS[op](**before, **options)
    truths = (truths,) if isinstance(truths, Truth) else truths
    dtype = result or next(name for name in map(dtype_of, arrays.values()) if "float" in name)
    for name, found, truth in zip(_names(len(truths)), results, truths, strict=True):
        own = min(dtype, "float32", key=UNIT.__getitem__) if truth.wide else dtype
        yield Compared(name, found, truth.value, bound(own, truth.length, truth.magnitude), own)
    for name, array in arrays.items():
        yield unchanged(name, array, before[name])


def unchanged(name: str, array: Any, before: np.ndarray) -> Compared:
    """An argument, which an op must leave alone."""
    return Compared(f"{name} afterwards", array, before, np.zeros(()), dtype_of(array))


def backward(
    op: str, arrays: Mapping[str, torch.Tensor | None], *, lay: Callable = lambda x: x, **options: Any
) -> Iterator[Compared]:
    """The gradients of every floating-point array, beside torch's of the plain op in float64.

    Upstream gradients are drawn here, in the results' dtypes; `lay` puts those of more than one dimension
    otherwise into memory.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    wanted = [name for name, x in given.items() if x.is_floating_point()]
    leaves = {name: x.detach().requires_grad_() if name in wanted else x for name, x in given.items()}
    wide = {name: x.detach().double().requires_grad_() if name in wanted else x for name, x in given.items()}

    results = tuple_of(getattr(gpukernels, op)(**leaves, **options))
    douts = [upstream(each, i) for i, each in enumerate(results)]
    before = [dout.clone() for dout in douts]
    douts = [lay(dout) if dout.ndim > 1 else dout for dout in douts]
    found = torch.autograd.grad(results, [leaves[name] for name in wanted], douts)
    truths = torch.autograd.grad(
        tuple_of(getattr(torch_ops, op)(**wide, **options)),
        [wide[name] for name in wanted],
        [dout.double() for dout in before],
    )
    # What is rounded on the way is rounded to the dtype of some array.
    coarsest = max((dtype_of(leaves[name]) for name in wanted), key=UNIT.__getitem__)
    sizes = GRADIENTS[op](
        **{name: host(x) for name, x in wide.items()},
        douts=[host(dout) for dout in before],
        **{name: host(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()},
    )
    for name, gradient, truth in zip(wanted, found, truths, strict=True):
        magnitude, length = sizes[name]
        yield Compared(f"d{name}", gradient, host(truth), bound(coarsest, length, magnitude), dtype_of(leaves[name]))
    for i, (dout, old) in enumerate(zip(douts, before, strict=True)):
        yield unchanged(f"upstream gradient {i}", dout, host(old))


def upstream(result: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A gradient of a result, drawn from a normal distribution."""
    drawn = np.random.default_rng([100 + seed, *result.shape]).standard_normal(result.shape)
    return torch.tensor(drawn).to(result.device, result.dtype)


def tuple_of(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _names(count: int) -> list[str]:
    return ["y"] if count == 1 else [f"y{i}" for i in range(count)]
