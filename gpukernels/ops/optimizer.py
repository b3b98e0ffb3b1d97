"""Optimizers: what changes parameters in place."""

import numpy as np

from gpukernels.numbers import finite, whole
from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_integers,
    check_number,
    check_scalar,
    check_shape,
    check_written,
    dtype_name,
    implementation,
    shape,
)


def adamw(
    parameter: Array,
    gradient: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    step: Array,
    learning_rate: Array,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decayed: int | None = None,
    master: Array | None = None,
    gradient_scale: Array | None = None,
) -> None:
    """Changes parameter, first_moment, second_moment and master in place: one step of Adam, the decay decoupled.

    With g = gradient * gradient_scale: m += (1 - beta1) (g - m), v += (1 - beta2) (g^2 - v), and
    p -= learning_rate (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay p).

    Args:
        parameter: (N,), contiguous: all parameters of a group, one behind another.
        gradient: (N,), floating point; not changed.
        first_moment, second_moment: (N,), contiguous, float32 (float64 for a float64 parameter); zeros at first.
        step: one int32 or int64: the number of this update, 1 for the first.
        learning_rate: one float32 (float64 for a float64 parameter).
        betas: how much of each moment is kept; 0 to less than 1.
        eps: added to the root of the second moment; not negative.
        weight_decay: the factor of the decay, not negative.
        decayed: how many leading elements decay (list the matrices first); None: all.
        master: (N,), contiguous, float32: the exact value of a float16 or bfloat16 parameter, which is set to
            its rounding; for no other parameter.
        gradient_scale: one float32 (float64 for a float64 parameter): undoes a loss scale and clips; None: 1.

    Raises:
        TypeError: arrays of different kinds or dtypes, or a master that is missing.
        ValueError: a shape that does not match, an array that is not contiguous, or an option outside its range.

    Numerics: float32; the bias corrections have a few units of float32 at any step. A gradient that is not
    finite makes its parameter and moments so, as in torch.
    Cost on the GPU: one launch, 28 N bytes in float32 (with 16-bit parameters and gradients too). step,
    learning_rate and gradient_scale are read there, so a captured graph sees them change.
    Source: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101.
    """
    state = {"parameter": parameter, "gradient": gradient, "first_moment": first_moment, "second_moment": second_moment}
    scalars = {"step": step, "learning_rate": learning_rate}
    run = implementation("adamw", state | scalars, master=master, gradient_scale=gradient_scale)
    check_floats("adamw", parameter=parameter, gradient=gradient)
    if parameter.ndim != 1:
        raise ValueError(f"adamw: parameter must be (N,), got {shape(parameter)}")
    dtype = dtype_name(parameter.dtype)
    if (master is not None) != (dtype in ("float16", "bfloat16")):
        came = "None" if master is None else "an array"
        want = "a float32 array" if master is None else "None"
        raise TypeError(f"adamw: master must be {want} for a {dtype} parameter, got {came}")
    for name, array in (state | {"master": master}).items():
        if array is None:
            continue
        check_shape("adamw", name, array, tuple(parameter.shape), "to match parameter")
        if name in ("first_moment", "second_moment", "master"):
            want = "float64" if dtype == "float64" else "float32"
            if dtype_name(array.dtype) != want:
                raise TypeError(f"adamw: {name} must be {want}, got {dtype_name(array.dtype)}")
        if name == "gradient":
            continue
        if not _contiguous(array):
            raise ValueError(f"adamw: {name} must be contiguous, got a strided view")
        check_written("adamw", name, array, whole=True)
    check_integers("adamw", "step", step)
    if tuple(step.shape) not in ((), (1,)):
        raise ValueError(f"adamw: step must be () or (1,), got {shape(step)}")
    check_scalar("adamw", "learning_rate", learning_rate, parameter)
    if gradient_scale is not None:
        check_scalar("adamw", "gradient_scale", gradient_scale, parameter)
    if not (hasattr(betas, "__len__") and len(betas) == 2 and all(finite(beta) and 0 <= beta < 1 for beta in betas)):
        raise ValueError(f"adamw: betas must be two numbers from 0 to less than 1, got {betas!r}")
    check_number("adamw", "eps", eps)
    check_number("adamw", "weight_decay", weight_decay)
    most = parameter.shape[0]
    if decayed is not None and not (whole(decayed) and 0 <= decayed <= most):
        raise ValueError(f"adamw: decayed must be a whole number, 0 to {most}, or None, got {decayed!r}")
    run.adamw(
        parameter,
        gradient,
        first_moment,
        second_moment,
        step=step,
        learning_rate=learning_rate,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decayed=decayed,
        master=master,
        gradient_scale=gradient_scale,
    )


def _contiguous(array) -> bool:
    if isinstance(array, np.ndarray):
        return array.flags.c_contiguous
    return not hasattr(array, "is_contiguous") or array.is_contiguous()  # another library's: asked as a tensor
