"""One case of `bench.kernels`: every provider's answer judged, then the right ones timed side by side."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from bench import gate
from bench.gpu_timing import Call, Clock, Device, copies, repeats
from bench.kernel_cases import Case, Inputs
from bench.rivals import OPS, OURS, Provider
from bench.timing import Times, interleaved

Row = dict[str, Any]


class Roofs(NamedTuple):
    """What this device reached, measured before anything else."""

    bandwidth: float  # bytes a second of a large copy, read and written ones
    tensor_flops: float  # operations a second of a large float16 product


class Work(NamedTuple):
    """What has to be done whoever does it: every input read once, every result written once, the products."""

    moved: int  # bytes
    flops: int
    dense: bool  # products are what it is about: its speed is told in operations, not in bytes

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.dense else "TB/s"

    def rate(self, seconds: float) -> float:
        """In units of `unit`."""
        return (self.flops if self.dense else self.moved) / seconds / 1e12

    def least(self, roofs: Roofs) -> float:
        """Seconds, if the device's roofs were reached."""
        return max(self.moved / roofs.bandwidth, self.flops / roofs.tensor_flops)


def work(case: Case, direction: str) -> Work:
    """Of one call; told from shapes alone, on the `meta` device."""
    inputs = case.draw("meta")
    results = gate.results(OPS[case.op].truth(**inputs))

    def size(arrays: Iterable[torch.Tensor]) -> int:
        return sum(distinct(x) for x in arrays)

    # A result has the inputs' dtype, but for tokens and losses, which are small.
    made = size(results)
    read = sum(made if name == case.gathered else size([x]) for name, x in inputs.items())
    gradients = size(inputs[name] for name in case.leaves)
    again = size(inputs[name] for name in (inputs if case.kept is None else case.kept))
    forward, backward = read + made, again + made + gradients
    dense = bool(case.flops and case.leaves)  # not of a few rows, nor of one query
    if direction == "forward":
        return Work(forward, case.flops, dense)
    if direction == "backward":
        return Work(backward, case.backward_flops, dense)
    both = forward + gradients if OPS[case.op].at_once is not None else forward + backward
    return Work(both, case.flops + case.backward_flops, dense)


def distinct(x: torch.Tensor) -> int:
    """Bytes of the elements that lie in memory: what is expanded does once."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def measure(case: Case, providers: Sequence[Provider], device: Device, roofs: Roofs, *, rounds: int) -> list[Row]:
    """A row for every direction and provider; one that is wrong or cannot run has a fault instead of a speed."""
    verdicts, faults = _judged(case, providers, device)
    rows = []
    for direction in case.directions:
        entries = {each.name: _entry(case, direction, each, verdicts, faults) for each in providers}
        runs = [each for each in providers if "fault" not in entries[each.name]]
        _time(case, direction, runs, entries, device, rounds)
        target = work(case, direction)
        for entry in entries.values():
            if "seconds" in entry:
                entry["rate"], entry["unit"] = target.rate(entry["seconds"]), target.unit
                entry["of_roof"] = target.least(roofs) / entry["seconds"]
                entry |= {"bytes": target.moved, "flops": target.flops}
        rows += entries.values()
        device.release()
    return rows


def _judged(case: Case, providers: Sequence[Provider], device: Device) -> tuple[dict, dict[str, str]]:
    try:
        try:
            truth = gate.true(case, device.kind)
        except torch.OutOfMemoryError:
            device.release()
            truth = gate.true(case, device.kind, torch.float32)
    except Exception as fault:  # of this case; others can still be measured
        return {}, {each.name: f"no truth to compare with: {in_a_line(fault)}" for each in providers}
    verdicts, faults = {}, {}
    for provider in providers:
        try:
            with provider.context():
                verdicts[provider.name] = gate.judge(case, provider, truth, device.kind)
        except Exception as fault:  # whatever another library raises
            faults[provider.name] = in_a_line(fault)
        device.release()
    return verdicts, faults


def _entry(case: Case, direction: str, provider: Provider, verdicts: dict, faults: dict[str, str]) -> Row:
    row: Row = {"op": case.op, "model": case.model, "shape": case.shape, "size": case.size, "quick": case.quick}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "direction": direction, "provider": provider.name}
    if provider.name in faults:
        return row | {"fault": faults[provider.name]}
    if provider.joint and direction == "backward":
        return row | {"fault": "its gradients are made in its forward pass: see both"}
    verdict = verdicts[provider.name][direction]
    if math.isfinite(verdict.error) and math.isfinite(verdict.of_bound):  # JSON has no other numbers
        row |= {"error": verdict.error, "of_bound": verdict.of_bound}
    if not verdict.right:
        row["fault"] = f"wrong answer: {verdict.where} is off by {verdict.of_bound:.3g} times its bound"
    return row


def _time(
    case: Case, direction: str, providers: Sequence[Provider], entries: dict[str, Row], device: Device, rounds: int
) -> None:
    """Adds the times to the providers' entries."""
    cold: dict[str, Clock] = {}
    hosted: dict[str, Clock] = {}
    for provider in providers:
        entry = entries[provider.name]
        try:
            with provider.context():
                graph, launched = clocks(case, direction, provider, entry, device)
        except Exception as fault:
            entry["fault"] = in_a_line(fault)
            continue
        hosted[provider.name] = _inside(provider, launched)
        if graph is not None:
            cold[provider.name] = graph
        entry["graph"] = graph is not None
    faults: dict[str, Exception] = {}
    for key, each in (("launched_", hosted), ("", cold)):
        times = interleaved(each, rounds=rounds, pause=0, faults=faults)
        for name, own in times.items():
            _add(entries[name], key, own, times.get(OURS))
    for name, fault in faults.items():
        entries[name]["fault"] = in_a_line(fault)
    for entry in entries.values():
        if "launched_seconds" in entry and not entry["graph"]:  # what there is; marked in tables
            entry |= {key: entry[f"launched_{key}"] for key in ("seconds", "seconds_20_80")}
        if "fault" in entry:
            for key in [key for key in entry if "seconds" in key or "speedup" in key]:
                del entry[key]


def _add(entry: Row, key: str, times: Times, ours: Times | None) -> None:
    entry[f"{key}seconds"] = times.median
    entry[f"{key}seconds_20_80"] = [times.quantile(0.2), times.quantile(0.8)]
    if ours is not None and times is not ours:
        entry[f"{key}speedup_of_ours"] = ours.speedup(times)


def clocks(case: Case, direction: str, provider: Provider, entry: Row, device: Device) -> tuple[Clock | None, Clock]:
    """The clock of a CUDA graph, None where none can be made, and the clock with the host's part."""
    calls: list[Call] = []

    def another() -> None:
        calls.append(_call(case, direction, provider, device, seed=len(calls)))

    held, _ = device.peak(another)
    calls[0]()  # compiles
    entry["peak_bytes"], seconds = device.peak(calls[0])
    count = copies(work(case, direction).moved, held + entry["peak_bytes"], device)
    while len(calls) < count:
        another()
    times = repeats(seconds, count)
    launched = device.launched(calls, times)
    launched()
    if not provider.capturable:
        return None, launched
    try:
        return device.captured(calls, times), launched
    except RuntimeError as fault:
        entry["no_graph"] = in_a_line(fault)
        return None, launched


def _call(case: Case, direction: str, provider: Provider, device: Device, seed: int) -> Call:
    """One call with inputs of its own."""
    inputs = case.draw(device.kind, seed)
    if direction == "forward":
        return torch.no_grad()(lambda: provider.run(**inputs))
    if direction == "both" and provider.at_once is not None:
        return torch.no_grad()(lambda: provider.at_once(**inputs))
    leaves = {name: inputs[name].requires_grad_() for name in case.leaves}
    results = gate.results(provider.run(**inputs))
    douts = [torch.ones_like(each) if not each.ndim else torch.randn_like(each) for each in results]
    if direction == "backward":
        return lambda: torch.autograd.grad(results, list(leaves.values()), douts, retain_graph=True)
    return lambda: _step(provider.run, inputs, list(leaves.values()), douts)


def _step(run: Callable[..., Any], inputs: Inputs, leaves: list[torch.Tensor], douts: list[torch.Tensor]) -> Any:
    results = gate.results(run(**inputs))
    return results, torch.autograd.grad(results, leaves, douts)


def _inside(provider: Provider, clock: Clock) -> Clock:
    if provider.context is contextlib.nullcontext:
        return clock

    def entered() -> float:
        with provider.context():
            return clock()

    return entered


def in_a_line(fault: Exception) -> str:
    """What an exception says, in one line of at most 100 characters."""
    if isinstance(fault, torch.OutOfMemoryError):
        return "out of memory"
    said = " ".join(str(fault).split()) or type(fault).__name__
    return said if len(said) <= 100 else said[:97] + "..."


def measured_roofs(device: Device, *, rounds: int = 10, nbytes: int = 1 << 30, side: int = 8192) -> Roofs:
    """A copy of `nbytes` (less, where memory is short) and a float16 product of `side` cubed."""
    nbytes = min(nbytes, device.free // 4)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device.kind) for _ in range(2))
    a, b = (torch.randn(side, side, device=device.kind).half() for _ in range(2))
    clocks = {
        "copy": device.captured([lambda: target.copy_(source)], 4),
        "product": device.captured([lambda: a @ b], 4),
    }
    times = interleaved(clocks, rounds=rounds, pause=0)
    return Roofs(2 * nbytes / times["copy"].median, 2 * side**3 / times["product"].median)
