"""Kernels against their rivals, at the shapes of GPT-2 and LLaMA-7B.

    python -m bench.kernels [--op attention] [--quick] [--json FILE] [--html FILE]
    python -m bench.kernels --tune layer_norm

For every op and shape: ours, torch, torch.compile, and what is installed of scaled_dot_product_attention's
backends and Liger-Kernel; torch's products are cuBLAS. First the answers, against float64: a wrong one gets no
speed. Then forward, backward and both, side by side in a CUDA graph with a cold L2 cache, and the same calls from
Python. The roofs are this device's own, measured first. Without a GPU the compile report's roofs are printed:
what the kernels could reach on four GPUs. The last line is the whole as JSON.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.output import require_writable
from bench.report import dumps, machine, show, write_json

_WIDTH = 150  # of the text tables


def main(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One or two shapes of each op, fewer rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, case by case.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page here.")] = None,
    tune: Annotated[str | None, typer.Option(metavar="OP", help="Try tiles of an op on this GPU instead.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each is timed; 20, with --quick 7.")] = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile among the providers (seconds for each shape).")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the --json file has; measure the rest.")] = False,
) -> None:
    """Measure, print a table for every op, and end with one line of JSON."""
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        _refuse(f"kernels need {' and '.join(missing)}, not installed here")
    import torch

    from bench import kernel_cases
    from gpukernels.kernels.device import INTERPRETING

    try:
        cases = kernel_cases.chosen(op, quick=quick)
        require_writable(json_file, html_file)
        if INTERPRETING:
            raise ValueError("kernels are interpreted in this process; start it without TRITON_INTERPRET")
        earlier = _earlier(json_file) if resume else []
    except ValueError as fault:
        _refuse(str(fault))
    here = torch.cuda.is_available()
    if tune is not None:
        if op or json_file or html_file:
            _refuse("--tune prints rows for one op; it goes with --quick and --rounds only")
        if not here:
            _refuse("--tune times tiles on a GPU, and there is no CUDA GPU here")
        _tune(tune, quick, rounds or 20)
        return
    rounds = rounds or (7 if quick else 20)
    if here:
        from bench.gpu_timing import Cuda

        json_file = json_file or Path(tempfile.mkdtemp()) / "kernels.json"
        try:
            document = run(cases, Cuda(), json_file, rounds=rounds, compiled=compiled, earlier=earlier)
        except DeviceLost as fault:
            # In the place of this process, with the cases that are left: the one that ended CUDA is in the file.
            print(f"{fault}: CUDA has failed, and the rest is measured in a new process", file=sys.stderr, flush=True)
            sys.stdout.flush()
            options = [each for each in sys.argv[1:] if each != "--resume"] + ["--resume", "--json", str(json_file)]
            os.execv(sys.executable, [sys.executable, "-m", "bench.kernels", *options])
    else:
        document = predict_all(cases, json_file)
    if html_file is not None:
        from bench import kernel_page

        (kernel_page.measured if here else kernel_page.predicted)(document).write(html_file)
    print(dumps(document))
    if any("fault" in row for row in document["rows"] if row.get("provider") == "ours"):
        sys.exit(1)


class DeviceLost(Exception):
    """After the case that it names nothing can be run in this process any more."""


def _earlier(json_file: Path | None) -> list[dict]:
    """The rows of a file; ValueError if it has none."""
    if json_file is None:
        raise ValueError("--resume goes with --json")
    try:
        return json.loads(json_file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as fault:
        raise ValueError(f"{json_file}: no figures to go on from: {fault}") from None


def run(
    cases: Sequence[Any],
    device: Any,
    json_file: Path | None,
    *,
    rounds: int,
    compiled: bool,
    earlier: Sequence[dict] = (),
    **roofs: int,
) -> dict[str, Any]:
    """Measures the cases on a device (see `bench.gpu_timing`), those that have no rows in `earlier`.

    `roofs` are options of `measured_roofs`.

    Raises:
        DeviceLost: the file has the rows so far, those of the case that did it too.
    """
    from bench import kernel_rows, kernel_tables, targets
    from bench.rivals import providers

    measured = kernel_rows.measured_roofs(device, **roofs)
    document = {"bench": "kernels", "machine": machine(), "device": device.name, "rounds": rounds}
    document |= {"roofs": measured._asdict(), "rows": [], "targets": targets.compared([], device.name)}
    print(
        f"{device.name}: copy {measured.bandwidth / 1e12:.2f} TB/s, product {measured.tensor_flops / 1e12:.0f} TFLOP/s"
    )
    shown: list[dict] = []
    for number, case in enumerate(cases):
        rows = [row for row in earlier if all(row[key] == getattr(case, key) for key in ("op", "model", "shape"))]
        rows = rows or kernel_rows.measure(case, providers(case.op, compiled=compiled), device, measured, rounds=rounds)
        document["rows"] += rows
        document["targets"] = targets.compared(document["rows"], device.name)
        if json_file is not None:
            write_json(json_file, document)
        if not device.alive():
            raise DeviceLost(case.name)
        shown += rows
        if number + 1 == len(cases) or cases[number + 1].op != case.op:
            for table in kernel_tables.measured(shown, narrow=True):
                show(table.title, table.columns, table.rows, width=_WIDTH)
                print(*table.notes, sep="\n")
            shown = []
    print(kernel_tables.NOTES)
    show("Targets", targets.COLUMNS, [targets.cells(each) for each in document["targets"]])
    return document


def predict_all(cases: Sequence[Any], json_file: Path | None) -> dict[str, Any]:
    """What the roofs of four GPUs allow."""
    from bench import kernel_tables
    from bench.predicted import predict

    print("No CUDA GPU here: nothing is measured. The least time of an H100's launches, by four GPUs' data sheets:")
    rows = [row for case in cases for row in predict(case)]
    document = {"bench": "kernels", "predicted": True, "machine": machine(), "rows": rows}
    for table in kernel_tables.predicted(rows):
        show(table.title, table.columns, table.rows, width=_WIDTH)
    if json_file is not None:
        write_json(json_file, document)
    return document


def _tune(op: str, quick: bool, rounds: int) -> None:
    from bench import tune
    from bench.gpu_timing import Cuda

    try:
        tune.tune(op, Cuda(), quick=quick, rounds=rounds)
    except ValueError as fault:
        _refuse(str(fault))


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
