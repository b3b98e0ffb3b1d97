"""The gate in front of every speed: is the answer right?

The truth is plain torch in float64. How far from it an answer may be is told by rounding itself. Every element
of every input is moved at random by up to one unit of its format, and the truth is made again: what that
changes is what one rounding on the way may change, and the result's own rounding comes on top. `ROUNDINGS` of
these are allowed: no way of doing one of these ops rounds more values one after another (eager attention has
five: scaled queries, scores, probabilities, products, sums). A row (over the last dimension) is held to the
largest row's allowance, since some rows' true values are 0. This catches a kernel that is wrong, not one that
is careless: that is what `gpukernels verify` is for.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from bench.kernel_cases import Case, Inputs
from bench.rivals import OPS, Provider

ROUNDINGS = 8
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

Results = dict[str, torch.Tensor]  # "result 0", ... and "dx", ...


class Verdict(NamedTuple):
    """Of one provider's answer in one direction."""

    error: float  # the largest difference from the truth, over the largest true value
    of_bound: float  # the worst row's difference, over what it may be
    where: str  # which result that was

    @property
    def right(self) -> bool:
        return self.of_bound <= 1  # not where it is NaN


class Truth(NamedTuple):
    values: Results
    moved: Results  # by inputs that are one rounding away
    douts: tuple[torch.Tensor, ...]  # the upstream gradients, in the case's dtype


def judged(case: Case, arrays: Mapping[str, torch.Tensor]) -> Inputs:
    """What the truth is made of: the leading rows where a case says how many."""
    return {name: array if case.judged is None else array[: case.judged] for name, array in arrays.items()}


def true(case: Case, device: str, wide: torch.dtype = torch.float64) -> Truth:
    """The truth of the inputs that `case.draw(device)` gives."""
    inputs = judged(case, case.draw(device))
    plain = OPS[case.op].truth
    exact = {name: x.to(wide) if x.is_floating_point() else x for name, x in inputs.items()}
    shapes = [result.shape for result in results(plain(**_copies(exact)))]
    generator = torch.Generator(device).manual_seed(1)
    douts = tuple(_upstream(case, shape, device, generator) for shape in shapes) if case.leaves else ()
    values = answers(case, plain, _copies(exact), [dout.to(wide) for dout in douts])

    def nudged(x: torch.Tensor, narrow: torch.dtype) -> torch.Tensor:
        noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
        return x * (1 + UNIT[narrow] * noise)

    near = {name: nudged(x, inputs[name].dtype) if x.is_floating_point() else x for name, x in exact.items()}
    moved = answers(case, plain, near, [nudged(dout.to(wide), case.dtype) for dout in douts])
    return Truth(values, moved, douts)


def _upstream(case: Case, shape: torch.Size, device: str, generator: torch.Generator) -> torch.Tensor:
    """One for a loss; random otherwise."""
    dout = torch.ones(shape, dtype=case.dtype, device=device)
    return dout.normal_(generator=generator) if shape else dout


def answers(case: Case, run: Callable[..., Any], inputs: Inputs, douts: list[torch.Tensor]) -> Results:
    """The results of a call, and the gradients of the case's leaves. What the op writes over, it may."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.leaves}
    if not leaves:
        with torch.no_grad():
            return {f"result {i}": each for i, each in enumerate(results(run(**inputs)))}
    made = results(run(**inputs | leaves))
    upstream = [dout.to(result.dtype) for dout, result in zip(douts, made, strict=True)]
    gradients = torch.autograd.grad(made, list(leaves.values()), upstream)
    found = {f"result {i}": each.detach() for i, each in enumerate(made)}
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def judge(case: Case, provider: Provider, truth: Truth, device: str) -> dict[str, Verdict]:
    """The verdict on one provider by direction, each on what will be timed.

    Forward is without a gradient, which may be another kernel; both is with one, or what `at_once` does. Each call
    gets new inputs, that lie as the case has them: some ops write over theirs. A truth of some leading rows is
    compared with those.
    """
    with torch.no_grad():
        alone = results(provider.run(**case.draw(device)))
    forward = {f"result {i}": each for i, each in enumerate(alone)}
    verdicts = {"forward": _worst(case, forward, truth)}
    if case.leaves:
        whole = [_whole(dout, each.shape) for dout, each in zip(truth.douts, alone, strict=True)]
        found = answers(case, provider.run, case.draw(device), whole)
        verdicts["backward"] = _worst(case, {f"d{name}": found[f"d{name}"] for name in case.leaves}, truth)
        if provider.at_once is not None:
            loss, *gradients = provider.at_once(**case.draw(device))
            named = {f"d{name}": each for name, each in zip(case.leaves, gradients, strict=True)}
            found = {"result 0": loss} | named
        verdicts["both"] = _worst(case, found, truth)
    return verdicts


def _whole(dout: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The upstream gradient of all rows: that of the leading ones, and zeros."""
    if dout.shape == shape:
        return dout
    return torch.cat([dout, dout.new_zeros((shape[0] - dout.shape[0], *shape[1:]))])


def _worst(case: Case, found: Results, truth: Truth) -> Verdict:
    verdicts = [_verdict(case, name, each, truth) for name, each in found.items()]
    worst = max(verdicts, key=lambda one: one.of_bound if one.of_bound == one.of_bound else float("inf"))
    return worst._replace(error=max(one.error for one in verdicts))


def _verdict(case: Case, name: str, found: torch.Tensor, truth: Truth) -> Verdict:
    value, moved = truth.values[name], truth.moved[name]
    found = found[: case.judged] if case.judged is not None else found
    if not value.is_floating_point():
        wrong = float((found != value).any())
        return Verdict(wrong, 2 * wrong, name)
    allowed = ROUNDINGS * (_rows(moved - value) + UNIT[case.dtype] * _rows(value)).max()
    difference = found.to(value.dtype) - value
    largest = value.abs().max()
    return Verdict(
        error=float(difference.abs().max() / largest), of_bound=float(_rows(difference).max() / allowed), where=name
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The length of each row."""
    return torch.linalg.vector_norm(x, dim=-1) if x.ndim else x.abs()


def _copies(inputs: Inputs) -> Inputs:
    """The same values in other memory: some ops write over their inputs."""
    return {name: x.clone() for name, x in inputs.items()}


def results(returned: Any) -> tuple[torch.Tensor, ...]:
    """What an op returned, as a tuple."""
    return returned if isinstance(returned, tuple) else (returned,)
