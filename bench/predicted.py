"""What the kernels could reach on GPUs that are not here: launches recorded and counted, and the roofs' times."""

from collections.abc import Callable
from typing import Any

import torch

from bench import gate
from bench.kernel_cases import Case
from bench.rivals import OPS
from gpukernels.compile_report import GPUS, Launch, cost, record, roofline

CAPABILITY = 90  # what is recorded: the launches of an H100

Row = dict[str, Any]


def predict(case: Case) -> list[Row]:
    """A row for every direction: launches, bytes, operations, and the least milliseconds by GPU.

    Every launch takes its own roof's time, one after the other: a kernel cannot be faster, nor overlap.
    """
    rows = []
    for direction in case.directions:
        launches = recorded(case, direction)
        costs = [cost(launch) for launch in launches]
        row: Row = {"op": case.op, "model": case.model, "shape": case.shape, "size": case.size}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
        row |= {"launches": len(launches), "kernels": list(dict.fromkeys(launch.kernel for launch in launches))}
        row |= {"bytes": sum(each.moved for each in costs), "flops": sum(each.flops for each in costs)}
        row["tensor_cores"] = any(each.tensor_cores for each in costs)
        row["milliseconds"] = {gpu.name: 1e3 * sum(roofline(each, gpu) for each in costs) for gpu in GPUS.values()}
        h100 = GPUS["H100"]
        by_memory = sum(roofline(each, h100) for each in costs if roofline(each, h100) == each.moved / h100.bandwidth)
        row["limit"] = "memory" if by_memory * 2e3 >= row["milliseconds"]["H100"] else "products"
        rows.append(row)
    return rows


def recorded(case: Case, direction: str, capability: int = CAPABILITY) -> list[Launch]:
    """The launches of one call on a GPU of this capability."""
    op = OPS[case.op]

    def forward() -> tuple:
        inputs = case.draw("meta")
        leaves = [inputs[name].requires_grad_() for name in case.leaves]
        return gate.results(op.ours(**inputs)), leaves

    def both() -> None:
        results, leaves = forward()
        torch.autograd.grad(results, leaves, [torch.empty_like(each) for each in results])

    def launched(call: Callable[[], Any]) -> list[Launch]:
        return record(call, capability=capability)

    if direction == "forward":
        return launched(torch.no_grad()(forward))
    if direction == "backward":
        return launched(both)[len(launched(forward)) :]
    if op.at_once is not None:
        return launched(lambda: op.at_once(**case.draw("meta")))
    return launched(both)
