"""Every op on the user's device: which cases are run, and how far each result is from its truth."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import gpukernels
from gpukernels import numpy_ops
from gpukernels.kernels.device import INTERPRETING
from gpukernels.verify import cases
from gpukernels.verify.allocations import guarded
from gpukernels.verify.cases import Case, Draw, as_values, laid_out
from gpukernels.verify.compare import (
    Compared,
    backward,
    copied,
    dtype_of,
    forward,
    host,
    on_host,
    unchanged,
    upstream,
)
from gpukernels.verify.layouts import LAYOUTS
from gpukernels.verify.truth import TRUTHS, bound, true_attention
from gpukernels.verify.truth_loss import true_divisor, true_gradients, true_linear_loss
from gpukernels.verify.truth_optimizer import true_adamw

DTYPES = ("float16", "bfloat16", "float32")


class Verdict(NamedTuple):
    """An op in one dtype, one way: the worst of all its cases."""

    op: str
    dtype: str
    way: str  # "forward" or "backward"
    cases: int
    worst: float  # the largest error, in units of its bound
    case: str  # where that was
    what: str  # in which array: "y", "dx", ...
    at: tuple[int, ...]  # and at which element
    error: str | None = None  # an exception in place of a result

    @property
    def holds(self) -> bool:
        return self.error is None and self.worst <= 1


class Op(NamedTuple):
    """What is verified of an op."""

    cases: Callable[[Draw], Iterator[Case]]
    forward: Callable[[Case], Iterable[Compared]]
    backward: Callable[[Case], Iterable[Compared]] | None = None
    huge: tuple[str, ...] = ()  # arrays whose values may be large
    written: tuple[str, ...] = ()  # arrays that must lie in memory as they do


def _result(op: str, *, result: str | None = None) -> Callable[[Case], Iterator[Compared]]:
    """Without a gradient: products of few rows have a kernel of their own then. result: as in `forward`."""

    def run(case: Case) -> Iterator[Compared]:
        with torch.no_grad():
            yield from forward(op, case.arrays, result=result, **case.options)

    return run


def _gradients(op: str) -> Callable[[Case], Iterator[Compared]]:
    return lambda case: backward(op, case.arrays, **case.options)


def _cached_attention(case: Case) -> Iterator[Compared]:
    """The result, and the caches with what is new in them."""
    given = case.arrays | copied({name: case.arrays[name] for name in ("keys", "values")})
    before = {name: host(array) for name, array in given.items()}
    new, capacity = given["k"].shape[1], given["keys"].shape[1]
    for row, length in enumerate(before["lengths"]):
        for cache, fresh in (("keys", "k"), ("values", "v")):
            for i in range(new):
                if 0 <= length - new + i < capacity:
                    before[cache][row, length - new + i] = before[fresh][row, i]
    found = gpukernels.cached_attention(**given, **case.options)
    truth = true_attention(before["q"], before["keys"], before["values"], lengths=before["lengths"], **case.options)
    dtype = dtype_of(given["q"])
    yield Compared("y", found, truth.value, bound(dtype, truth.length, truth.magnitude), dtype)
    for name, array in given.items():
        yield unchanged(name, array, before[name])


def _loss_gradient(case: Case) -> Iterator[Compared]:
    logits = case.arrays["logits"].detach().requires_grad_()
    loss = gpukernels.cross_entropy(**(case.arrays | {"logits": logits}), **case.options)
    dloss = upstream(loss)
    (found,) = torch.autograd.grad(loss, logits, dloss)
    yield _compared_gradient(case, found, host(dloss))


def _loss_with_gradient(case: Case) -> Iterator[Compared]:
    loss, found = gpukernels.cross_entropy_with_gradient(**case.arrays, **case.options)
    truth = TRUTHS["cross_entropy"](**{name: host(array) for name, array in case.arrays.items()}, **case.options)
    yield Compared("y", loss, truth.value, bound("float32", truth.length, truth.magnitude), "float32")
    yield _compared_gradient(case, found, np.ones(()))


def _compared_gradient(case: Case, found: Any, factor: np.ndarray) -> Compared:
    """dlogits; factor: the loss's upstream gradient."""
    given = {name: host(array) for name, array in case.arrays.items()}
    options = dict(case.options)
    if options.pop("reduction", "mean") == "mean":
        divisor = true_divisor(given["targets"], given.get("weights"))
        factor = factor / divisor if divisor else 0 * factor
    factor = np.broadcast_to(factor, given["targets"].shape)[..., None]
    _, truth = true_gradients(**given, **options)
    limit = bound(dtype_of(found), truth.length + given["targets"].size, abs(factor) * truth.magnitude)
    return Compared("dlogits", found, factor * truth.value, limit, dtype_of(case.arrays["logits"]))


def _linear_loss(case: Case, *, gradients: bool) -> Iterator[Compared]:
    leaves = {name: case.arrays[name] for name in ("hidden", "weight")}
    if gradients:
        leaves = {name: array.detach().requires_grad_() for name, array in leaves.items()}
    loss = gpukernels.linear_cross_entropy(**(case.arrays | leaves), **case.options)
    dtype, given = dtype_of(leaves["hidden"]), {name: host(array) for name, array in case.arrays.items()}
    dloss = upstream(loss) if gradients else None
    truths = true_linear_loss(dtype, **given, upstream=host(dloss) if gradients else 1.0, **case.options)
    if not gradients:
        value, magnitude, length, _ = truths["loss"]
        yield Compared("y", loss, value, bound(dtype, length, magnitude), "float32")
        return
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), dloss), strict=True):
        value, magnitude, length, _ = truths[name]
        yield Compared(f"d{name}", gradient, value, bound(dtype, length, magnitude), dtype)


def _adamw(case: Case) -> Iterator[Compared]:
    given = copied(case.arrays)
    before = {name: host(array) for name, array in given.items()}
    gpukernels.adamw(**given, **case.options)
    truths = true_adamw(before, **case.options)
    for name, array in given.items():
        if name in truths:
            value, magnitude, length, _ = truths[name]
            yield Compared(name, array, value, bound(dtype_of(array), length, magnitude), dtype_of(array))
        else:
            yield unchanged(name, array, before[name])


def _sample(case: Case) -> Iterator[Compared]:
    """The tokens are those of NumPy, always: there is no tolerance."""
    found = gpukernels.sample(**case.arrays, **case.options)
    value = numpy_ops.sample(**on_host(case.arrays), **case.options)
    yield Compared("y", found, value.astype(float), np.zeros(()), "int64")


def _sample_embed(case: Case) -> Iterator[Compared]:
    """The tokens, and what a decode step has written for the next one."""
    given = copied(case.arrays)
    before = {name: host(array) for name, array in given.items()}
    drawing = {name: array for name, array in case.arrays.items() if name not in cases.STEPPED}
    in_use = before["lengths"] > 0
    tokens = np.where(in_use, numpy_ops.sample(**on_host(drawing)), -1)
    x, size = before["x"].copy(), abs(before["x"])
    seen = before["seen"].copy() if "seen" in before else None
    for row in np.flatnonzero(in_use):
        parts = [before["weight"][max(tokens[row], 0)]]
        if "position_weight" in before:
            table = before["position_weight"]
            parts.append(table[min(int(before["lengths"][row]), len(table) - 1)])
        x[row, 0], size[row, 0] = sum(parts), sum(map(abs, parts))
        if seen is not None and tokens[row] >= 0:
            seen[row, tokens[row]] = True
    found = gpukernels.sample_embed(**given, **case.options)
    yield Compared("y", found, tokens, np.zeros(()), "int64")
    yield Compared("x", given["x"], x, bound(dtype_of(given["x"]), 1, size), dtype_of(given["x"]))
    wanted = before | {"lengths": before["lengths"] + in_use}
    wanted |= {} if seen is None else {"seen": seen, "step": before["step"] + in_use}
    for name in set(given) - {"x"}:
        yield unchanged(name, given[name], wanted[name])


OPS = {
    "layer_norm": Op(
        partial(cases.norms, bias=True), _result("layer_norm"), _gradients("layer_norm"), ("x", "residual")
    ),
    "rms_norm": Op(partial(cases.norms, bias=False), _result("rms_norm"), _gradients("rms_norm"), ("x", "residual")),
    "linear": Op(cases.linears, _result("linear"), _gradients("linear"), ("x",)),
    "norm_linear": Op(cases.norm_linears, _result("norm_linear"), _gradients("norm_linear"), ("x",)),
    "matmul": Op(cases.matmuls, _result("matmul"), _gradients("matmul"), ("a",)),
    "attention": Op(cases.attentions, _result("attention"), _gradients("attention"), ("v",)),
    "packed_attention": Op(cases.packed_attentions, _result("packed_attention"), _gradients("packed_attention")),
    "decode_attention": Op(cases.decode_attentions, _result("decode_attention"), huge=("v",)),
    "cached_attention": Op(
        cases.cached_attentions, _cached_attention, huge=("v", "values"), written=("keys", "values")
    ),
    "gelu": Op(cases.gelus, _result("gelu"), _gradients("gelu"), ("x",)),
    "swiglu": Op(cases.swiglus, _result("swiglu"), _gradients("swiglu"), ("up",)),
    "rope": Op(cases.ropes, _result("rope"), _gradients("rope"), ("x",)),
    "embedding": Op(cases.embeddings, _result("embedding"), _gradients("embedding"), ("weight", "position_weight")),
    "cross_entropy": Op(cases.losses, _result("cross_entropy", result="float32"), _loss_gradient),
    "cross_entropy_with_gradient": Op(cases.losses, _loss_with_gradient),
    "linear_cross_entropy": Op(
        cases.linear_losses,
        partial(_linear_loss, gradients=False),
        partial(_linear_loss, gradients=True),
    ),
    "adamw": Op(cases.optimizers, _adamw),
    "sample": Op(cases.samples, _sample),
    "sample_embed": Op(cases.sample_embeds, _sample_embed, written=("x", "seen")),
}


def dtypes_of(device: torch.device | None) -> list[str]:
    """Those in which ops can be verified: NumPy has no bfloat16."""
    return [dtype for dtype in DTYPES if not (device is None and dtype == "bfloat16")]


def verify(op: str, dtype: str, device: torch.device | None, *, quick: bool = False) -> Iterator[Verdict]:
    """The verdicts on an op in one dtype: forward, and backward where it has a gradient.

    Args:
        op: a key of `OPS`.
        dtype: one of `dtypes_of(device)`.
        device: CUDA's; the CPU, where Triton interprets; None: NumPy, which has no gradients.
        quick: the small cases only.
    """
    if INTERPRETING and device is not None:
        from gpukernels.verify.interpreter import adapt

        adapt()
    drawn = _cases(OPS[op], Draw(dtype, device or torch.device("cpu"), quick))
    every = [case if device else case._replace(arrays=on_host(case.arrays)) for case in drawn]
    yield _verdict(op, dtype, "forward", OPS[op].forward, every)
    if OPS[op].backward is not None and device is not None:
        yield _verdict(op, dtype, "backward", OPS[op].backward, every)


def _cases(op: Op, draw: Draw) -> Iterator[Case]:
    """The op's own cases, and the first of them in other layouts and with other values."""
    own = list(op.cases(draw))
    yield from own
    for layout, lay in LAYOUTS.items():
        if layout != "contiguous":
            yield laid_out(layout, lay, own[0], op.written)
    for values in ("tiny", *(["huge"] if op.huge else [])):
        yield as_values(values, own[0], draw.dtype, op.huge)


def _verdict(
    op: str, dtype: str, way: str, run: Callable[[Case], Iterable[Compared]], every: list[Case]
) -> Verdict:  # fmt: skip
    worst: dict[str, Any] = {"worst": -1.0, "case": "", "what": "", "at": ()}
    for case in every:
        try:
            on_torch = any(isinstance(array, torch.Tensor) for array in case.arrays.values())
            with guarded() if on_torch else contextlib.nullcontext():
                results = list(run(case))
        except Exception as fault:
            text = f"{type(fault).__name__}: {fault}".splitlines()[0]
            return Verdict(op, dtype, way, len(every), np.inf, case.name, "", (), text)
        for each in results:
            errors = each.errors()
            if errors.size and errors.max() > worst["worst"]:
                at = np.unravel_index(errors.argmax(), errors.shape)
                worst = {"worst": float(errors.max()), "case": case.name, "what": each.what, "at": tuple(map(int, at))}
    return Verdict(op, dtype, way, len(every), **worst)
