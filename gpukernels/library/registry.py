"""How an op is registered with torch: one schema, an implementation for each device, a fake one.

`Library.define` and `impl` cost an eager call about half of what `torch.library.custom_op` costs.
"""

from collections.abc import Callable

import torch

from gpukernels.ops.checks import kernel_devices

_LIBRARY = torch.library.Library("gpukernels", "DEF")

#: The launchers by op name, for whoever calls them past the dispatcher (see `gpukernels.compile_report`).
LAUNCHERS: dict[str, Callable] = {}


def define(signature: str, *, launch: Callable, plain: Callable, fake: Callable) -> Callable:
    """Registers `gpukernels::<signature>` and returns the op.

    Args:
        signature: as torch's schemas have it, "layer_norm(Tensor x, ...) -> (Tensor, Tensor)".
        launch: the kernels' launcher: runs CUDA tensors, and CPU tensors where Triton interprets or a GPU is emulated.
        plain: the same in plain torch, for CPU tensors otherwise.
        fake: the results' shapes, dtypes and strides, from tensors without data.
    """
    name = signature.partition("(")[0]
    LAUNCHERS[name] = launch
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, _on_its_device(launch), "CUDA")
    _LIBRARY.impl(name, _on_the_cpu(launch, _as_written(plain)), "CPU")
    torch.library.register_fake(f"gpukernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gpukernels, name).default


def differentiate(op: Callable, setup_context: Callable, backward: Callable, *, twice: bool = False) -> None:
    """Gives an op its gradient: both functions as `torch.library.register_autograd` takes them.

    twice: `backward` is made of ops that have gradients themselves. Without it a second derivative is refused.
    """
    backward = backward if twice else only_once(op.name(), backward)
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)


def only_once(name: str, backward: Callable) -> Callable:
    """torch would take a backward op without a gradient of its own for a constant, and make wrong second ones."""

    def run(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        # create_graph=True: what is found is a result of everything that it was made from.
        ctx = _Opened(ctx)
        found = backward(ctx, *upstream)
        sources = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        if not sources:
            return found
        return tuple(x if x is None else _NoSecond.apply(name, x.detach(), *sources) for x in found)

    return run


class _Opened:
    """A context whose tensors are unpacked once, for a checkpoint makes them only once."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _NoSecond(torch.autograd.Function):
    """x as it is, and an error where it is differentiated by its sources."""

    @staticmethod
    def forward(name, x, *sources):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, dx):
        raise RuntimeError(f"{ctx.name} has no second derivative; plain torch has one: gpukernels.torch_ops")


def wants_gradient(*arrays: torch.Tensor | None) -> bool:
    """Whether a call with these arrays will be differentiated."""
    return torch.is_grad_enabled() and any(array is not None and array.requires_grad for array in arrays)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that a product of x is made in under `torch.autocast`; None where it is off, or x has 64 bits."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*arrays: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The arrays in the dtype that autocast asks for, or as they are."""
    dtype = autocast_dtype(arrays[0])
    return arrays if dtype is None else tuple(None if x is None else x.to(dtype) for x in arrays)


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on torch's current device, and the tensors may be on another."""

    def launch_there(*args):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return launch_there


def _on_the_cpu(launch: Callable, plain: Callable) -> Callable:
    """Whether kernels run there is asked at each call, as it is by `gpukernels.ops`."""

    def run(*args):
        return launch(*args) if "cpu" in kernel_devices else plain(*args)

    return run


def _as_written(plain: Callable) -> Callable:
    """Plain torch in the dtypes that it says, which autocast would change underneath it."""

    def run(*args):
        with torch.autocast("cpu", enabled=False):
            return plain(*args)

    return run


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor without values, of like's device, and of its dtype unless one is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
