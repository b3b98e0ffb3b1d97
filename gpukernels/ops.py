"""The public ops: what each one means, what it accepts, and one call to what runs it.

The type of the arrays chooses the implementation: `np.ndarray` runs `numpy_ops` (which imports
NumPy only), `torch.Tensor` runs `torch_ops`. Nothing else does: no global switch, no environment
variable. Every check stands here, before anything is allocated, so that all implementations accept
and refuse the same calls with the same words.

Dimensions: B batch, T new positions, S key positions, H query heads, Hkv key-value heads, D head
width, C model width, V vocabulary; matrices M, N, K. Weights are (out, in), as torch has them; any
strides will do. Inputs are float16, float32, float64 (and bfloat16 for torch); statistics, sums and
softmax are computed in float32 at least, and a result has the dtype of `x` (or `a`, or `q`).
A weight may be narrower than `x` (float16 storage under float32 activations): it is widened, exactly,
as it is used.
"""

import functools
import sys
from types import ModuleType
from typing import TypeVar

import numpy as np

from gpukernels import numpy_ops

Array = TypeVar("Array")

#: Activations of `linear` and `norm_linear`: `gelu` is the exact one (erf), `gelu_new` the tanh form.
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "tanh")

_NUMPY, _NUMPY_OR_NONE = {np.ndarray}, {np.ndarray, type(None)}

_FLOATS = {"float16", "bfloat16", "float32", "float64"}


def layer_norm(
    x: Array, weight: Array, bias: Array | None = None, *, eps: float = 1e-5, residual: Array | None = None
) -> Array | tuple[Array, Array]:
    """Layer norm over the last dimension, with an optional residual add in front of it.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + residual, and the biased
    variance.

    Args:
        x: (..., C).
        weight: (C,), the scale.
        bias: (C,), the shift, or None.
        eps: added to the variance; not negative.
        residual: (..., C), the shape of x. With it, the sum is returned too.

    Returns:
        y, of x's shape and dtype; with `residual`, the pair (y, s).

    Raises:
        TypeError: arrays of different kinds, or not floating point.
        ValueError: a shape that does not match, or a negative eps.

    Cost: one read of each input and one write of each output. Source: Ba et al., arXiv 1607.06450.
    """
    run = _implementation("layer_norm", {"x": x, "weight": weight}, bias=bias, residual=residual)
    _check_floats("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    _check_norm("layer_norm", x, weight, bias, eps, "weight", "bias")
    if residual is not None:
        _check_shape("layer_norm", "residual", residual, tuple(x.shape), "to match x")
    return run.layer_norm(x, weight, bias, eps=eps, residual=residual)


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """y = activation(x @ weight.T + bias) + residual.

    Args:
        x: (..., K).
        weight: (N, K), any strides; (K, N) storage is passed as its transposed view.
        bias: (N,) or None.
        activation: one of `ACTIVATIONS`, or None.
        residual: (..., N), added last, or None.

    Returns:
        (..., N), of x's dtype.

    Raises:
        TypeError: arrays of different kinds, or not floating point.
        ValueError: a shape that does not match, or an unknown activation.

    Cost: 2 M N K flops for M rows; with few rows, one read of the weight.
    """
    run = _implementation("linear", {"x": x, "weight": weight}, bias=bias, residual=residual)
    _check_floats("linear", x=x, weight=weight, bias=bias, residual=residual)
    _check_product("linear", x, weight, bias, activation)
    if residual is not None:
        _check_shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]), "to match the result")
    return run.linear(x, weight, bias, activation=activation, residual=residual)


def norm_linear(
    x: Array,
    norm_weight: Array,
    norm_bias: Array | None,
    weight: Array,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Array:
    """activation(layer_norm(x, norm_weight, norm_bias, eps) @ weight.T + bias), what a decode step fuses.

    Args:
        x: (..., C).
        norm_weight, norm_bias: (C,), of the layer norm; the bias may be None.
        weight: (N, C).
        bias: (N,) or None.
        eps: of the layer norm; not negative.
        activation: one of `ACTIVATIONS`, or None.

    Returns:
        (..., N), of x's dtype. Raises as `layer_norm` and `linear` do.
    """
    arrays = {"x": x, "norm_weight": norm_weight, "weight": weight}
    run = _implementation("norm_linear", arrays, norm_bias=norm_bias, bias=bias)
    _check_floats("norm_linear", **arrays, norm_bias=norm_bias, bias=bias)
    _check_norm("norm_linear", x, norm_weight, norm_bias, eps, "norm_weight", "norm_bias")
    _check_product("norm_linear", x, weight, bias, activation)
    return run.norm_linear(x, norm_weight, norm_bias, weight, bias, eps=eps, activation=activation)


def matmul(a: Array, b: Array) -> Array:
    """The matrix product a @ b, batched over equal leading dimensions.

    Args:
        a: (..., M, K).
        b: (..., K, N) with the same leading dimensions, or (K, N) for all of them.

    Returns:
        (..., M, N), of a's dtype; float16 and bfloat16 are accumulated in float32.

    Raises:
        TypeError: arrays of different kinds or dtypes, or not floating point.
        ValueError: shapes that do not multiply.
    """
    run = _implementation("matmul", {"a": a, "b": b})
    _check_floats("matmul", a=a, b=b)
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: b must have a's dtype {_dtype_name(a.dtype)}, got {_dtype_name(b.dtype)}")
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: a and b must have 2 dimensions or more, got {_shape(a)} and {_shape(b)}")
    if b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"matmul: the leading dimensions of a and b must be equal, got {_shape(a)} and {_shape(b)}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: b must be (..., {a.shape[-1]}, N) to match a {_shape(a)}, got {_shape(b)}")
    return run.matmul(a, b)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    lengths: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Scaled dot-product attention; the queries are the tail of the keys.

    out = softmax(scale * q @ k.T + mask) @ v, by head. Query i of row b stands at position
    p = lengths[b] - T + i. It sees the keys j < lengths[b]; with `causal`, those with j <= p; with
    `window`, those with p - window < j <= p. A query at a negative position is padding: its output
    is 0. Key-value head h serves the query heads h * H/Hkv to (h + 1) * H/Hkv - 1.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, Hkv, D), Hkv a divisor of H.
        causal: mask the keys after the query's own position.
        window: how many keys, its own included, a query sees at most; needs `causal`.
        lengths: (B,) int32 or int64, the keys in use of each row, 0 to S; default S for all.
            NumPy checks the values; torch does not (that would wait for the device).
        scale: default 1 / sqrt(D).

    Returns:
        (B, T, H, D), contiguous, of q's dtype.

    Raises:
        TypeError: arrays of different kinds, dtypes that do not match, `lengths` not integers.
        ValueError: shapes that do not match, a window below 1 or without `causal`.

    Numerics: scores and softmax in float32 (float64 for float64 inputs), masked before the maximum is
    taken. Source: Vaswani et al., arXiv 1706.03762; grouped heads: Ainslie et al., arXiv 2305.13245.
    """
    run = _implementation("attention", {"q": q, "k": k, "v": v}, lengths=lengths)
    _check_floats("attention", q=q, k=k, v=v)
    if q.ndim != 4:
        raise ValueError(f"attention: q must be (B, T, H, D), got {_shape(q)}")
    batch, new, heads, width = q.shape
    if heads == 0 or width == 0:
        raise ValueError(f"attention: q must be (B, T, H, D) with H and D of 1 or more, got {_shape(q)}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"attention: k must be ({batch}, S, Hkv, {width}) to match q, got {_shape(k)}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"attention: k's heads must divide the {heads} heads of q, got {k.shape[2]}")
    _check_shape("attention", "v", v, tuple(k.shape), "to match k")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} must have q's dtype {_dtype_name(q.dtype)}, got {_dtype_name(array.dtype)}"
            )
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"attention: window must be a whole number, 1 or more, got {window!r}")
    if window is not None and not causal:
        raise ValueError("attention: window needs causal=True")
    if lengths is None:
        if causal and new > k.shape[1]:
            raise ValueError(f"attention: q has {new} positions but k only {k.shape[1]}; pass lengths for padding")
    else:
        _check_shape("attention", "lengths", lengths, (batch,), "one length for each row")
        _check_integers("attention", "lengths", lengths)
        if isinstance(lengths, np.ndarray) and lengths.size and not 0 <= lengths.min() <= lengths.max() <= k.shape[1]:
            raise ValueError(f"attention: lengths must be 0 to {k.shape[1]}, got {lengths.min()} to {lengths.max()}")
    return run.attention(q, k, v, causal=causal, window=window, lengths=lengths, scale=scale)


def embedding(
    ids: Array,
    weight: Array,
    *,
    positions: Array | None = None,
    position_weight: Array | None = None,
    dtype=None,
) -> Array:
    """weight[ids], plus position_weight[positions] where those are given.

    Args:
        ids: (...), int32 or int64, 0 to V - 1. NumPy checks the values; torch on CUDA does not.
        weight: (V, C).
        positions: (...), the shape of ids, 0 to P - 1.
        position_weight: (P, C); goes with `positions`.
        dtype: of the result (a dtype of the arrays' own library), default weight's. The sum is
            computed in it.

    Returns:
        (..., C).

    Raises:
        TypeError: arrays of different kinds, ids not integers, or tables not floating point.
        ValueError: shapes that do not match, one of positions and position_weight alone.
        IndexError: an id or position outside its table (NumPy, and torch on the CPU).
    """
    arrays = {"ids": ids, "weight": weight}
    run = _implementation("embedding", arrays, positions=positions, position_weight=position_weight)
    _check_floats("embedding", weight=weight, position_weight=position_weight)
    _check_integers("embedding", "ids", ids)
    if dtype is not None and getattr(dtype, "__name__", str(dtype)).removeprefix("torch.") not in _FLOATS:
        raise TypeError(f"embedding: dtype must be a floating-point dtype, got {dtype!r}")
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight must be (V, C), got {_shape(weight)}")
    if (positions is None) != (position_weight is None):
        given = "positions" if position_weight is None else "position_weight"
        raise ValueError(f"embedding: positions and position_weight go together, got only {given}")
    if positions is not None:
        _check_integers("embedding", "positions", positions)
        _check_shape("embedding", "positions", positions, tuple(ids.shape), "to match ids")
        if position_weight.ndim != 2 or position_weight.shape[1] != weight.shape[1]:
            raise ValueError(
                f"embedding: position_weight must be (P, {weight.shape[1]}) to match weight, "
                f"got {_shape(position_weight)}"
            )
    return run.embedding(ids, weight, positions=positions, position_weight=position_weight, dtype=dtype)


def _implementation(op: str, required: dict, **optional) -> ModuleType:
    """The module that runs `op` for these arrays; an optional one may be None."""
    # Sets of types first: a decode step asks this seventy times a token.
    if set(map(type, required.values())) == _NUMPY and set(map(type, optional.values())) <= _NUMPY_OR_NONE:
        return numpy_ops
    for name, array in required.items():
        if array is None:
            raise TypeError(f"{op}: {name} must be an array, got None")
    given = required | {name: array for name, array in optional.items() if array is not None}
    if all(isinstance(array, np.ndarray) for array in given.values()):
        return numpy_ops
    # A torch tensor can only be here if its owner has imported torch.
    torch = sys.modules.get("torch")
    if torch is not None and all(isinstance(array, torch.Tensor) for array in given.values()):
        from gpukernels import torch_ops

        devices = {array.device for array in given.values()}
        if len(devices) > 1:
            where = ", ".join(f"{name} on {array.device}" for name, array in given.items())
            raise ValueError(f"{op}: the arrays must be on one device, got {where}")
        return torch_ops
    kinds = ", ".join(f"{name} {type(array).__module__}.{type(array).__name__}" for name, array in given.items())
    raise TypeError(f"{op}: the arrays must be all numpy.ndarray or all torch.Tensor, got {kinds}")


@functools.cache
def _dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(array) -> str:
    return str(tuple(array.shape))


def _check_floats(op: str, **arrays) -> None:
    for name, array in arrays.items():
        if array is not None and _dtype_name(array.dtype) not in _FLOATS:
            raise TypeError(f"{op}: {name} must be a floating-point array, got {_dtype_name(array.dtype)}")


def _check_integers(op: str, name: str, array) -> None:
    if _dtype_name(array.dtype) not in ("int32", "int64"):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {_dtype_name(array.dtype)}")


def _check_shape(op: str, name: str, array, want: tuple, why: str) -> None:
    if tuple(array.shape) != want:
        raise ValueError(f"{op}: {name} must be {want} {why}, got {_shape(array)}")


def _check_norm(op: str, x, weight, bias, eps: float, weight_name: str, bias_name: str) -> None:
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be (..., C) with C of 1 or more, got {_shape(x)}")
    for name, array in ((weight_name, weight), (bias_name, bias)):
        if array is not None:
            _check_shape(op, name, array, (x.shape[-1],), "to match x")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be 0 or more, got {eps}")


def _check_product(op: str, x, weight, bias, activation: str | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must be (N, K), got {_shape(weight)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x must be (..., {weight.shape[1]}) to match weight {_shape(weight)}, got {_shape(x)}")
    if bias is not None:
        _check_shape(op, "bias", bias, (weight.shape[0],), "to match weight")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, or None, got {activation!r}")
