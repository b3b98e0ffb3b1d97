"""`gpukernels verify`: every op on this machine, against float64."""

import importlib.util
import json
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from model.cli.options import Json, progress_bar, table_console
from model.device import why_no_cuda
from model.errors import ModelError


def verify(
    op: Annotated[
        list[str] | None, typer.Option(help="One op; may be given again. Default: all.", show_default=False)
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float16, bfloat16 or float32; may be given again. Default: all.", show_default=False),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cuda, cuda:1, cpu for the NumPy implementation, or sm_80, sm_89, sm_90 to emulate such a GPU."
        ),
    ] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes only.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="How many ops side by side; default one a core, 8 at most.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every op with float64 over hard shapes and values; exit code 1 if an error is beyond its bound.

    An error of 1 is as large as rounding can explain. Runs on a GPU, with TRITON_INTERPRET=1 in Triton's
    interpreter, with --device cpu on NumPy, and with --device sm_90 without a GPU as its code was compiled for one.
    """
    where, name, capability = _device(device)
    from gpukernels.verify import DTYPES, OPS, dtypes_of, gather

    for option, given, known in (("--op", op, OPS), ("--dtype", dtype, DTYPES)):
        for each in given or []:
            if each not in known:
                raise ModelError(f"{option} must be one of {', '.join(known)}, got {each}")
    kinds = [kind for kind in dtypes_of(where) if not dtype or kind in dtype]
    if not kinds:
        raise ModelError(f"--dtype {dtype[0]}: NumPy has no such type")
    ops = [each for each in OPS if not op or each in op]
    by_op: dict[str, list] = {}
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=len(ops))
        for each, verdicts in gather(ops, kinds, where, quick=quick, processes=processes, capability=capability):
            by_op[each] = verdicts
            bar.update(task, advance=1, description=each)
    found = [verdict for each in ops for verdict in by_op[each]]
    holds = all(verdict.holds for verdict in found)
    if as_json:
        verdicts = [_document(verdict) for verdict in found]
        print(json.dumps({"device": name, "quick": quick, "holds": holds, "verdicts": verdicts}))
    else:
        _print(found, name, table_console(120))
        if where is None:
            print("Without bfloat16, as NumPy has no such type.")
    if not holds:
        raise typer.Exit(1)


def _device(device: str) -> tuple[Any, str, int | None]:
    """The device to verify on, None for NumPy, its name, and the capability of one that is emulated."""
    kind, _, index = device.partition(":")
    emulated = re.fullmatch(r"sm_(\d+)", device)
    if device not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()) and not emulated:
        raise ModelError(f"--device must be cuda, cuda:1 (or another number), cpu, or sm_90, got {device!r}")
    if importlib.util.find_spec("torch") is None:
        raise ModelError("verify: torch, which makes the inputs, is not installed: pip install 'gpukernels[train]'")
    import torch

    if device == "cpu":
        return None, "NumPy on the CPU", None
    if importlib.util.find_spec("triton") is None:
        raise ModelError("verify: Triton is not installed; --device cpu verifies the NumPy implementation")
    import triton

    if emulated:
        from gpukernels.emulator import CAPABILITIES

        capability = int(emulated[1])
        if capability not in CAPABILITIES:
            known = ", ".join(f"sm_{each}" for each in CAPABILITIES)
            raise ModelError(f"--device: what can be emulated is {known}, got {device!r}")
        if triton.knobs.runtime.interpret:
            raise ModelError(f"--device {device} runs compiled kernels, and TRITON_INTERPRET is set: unset it")
        return torch.device("cpu"), f"an emulated {CAPABILITIES[capability]} ({device})", capability
    if triton.knobs.runtime.interpret:
        return torch.device("cpu"), "Triton's interpreter on the CPU", None
    reason = why_no_cuda()
    if reason:
        raise ModelError(
            f"verify: {reason}; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, --device sm_90 emulates "
            "an H100, and --device cpu verifies the NumPy implementation"
        )
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise ModelError(f"--device {device}: torch sees {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", number), torch.cuda.get_device_name(number), None


def _print(found: list, name: str, console: Console) -> None:
    table = Table(
        title=f"Errors on {name}, in units of the bound", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for column in ("op", "dtype", "", "cases", "worst", "where"):
        justify = "right" if column in ("cases", "worst") else "left"
        table.add_column(column, justify=justify, overflow="fold")  # nothing is left out of a narrow table
    for verdict in found:
        worst = f"{verdict.worst:.2g}" if verdict.holds else f"{verdict.worst:.3g} BROKEN"
        table.add_row(verdict.op, verdict.dtype, verdict.way, str(verdict.cases), worst, _where(verdict))
    console.print(table)
    broken = [verdict for verdict in found if not verdict.holds]
    cases = sum(verdict.cases for verdict in found)
    if broken:
        console.print(f"{len(broken)} of {len(found)} rows are beyond the bound:")
        for verdict in broken:
            console.print(
                f"  {verdict.op} {verdict.dtype} {verdict.way}: {verdict.worst:.3g} at {_where(verdict)}",
                soft_wrap=True,
            )
    else:
        console.print(f"All {cases} cases are within the bound.")


def _where(verdict: Any) -> str:
    """The case and the element of the largest error: "x (5, 129): y[3, 77]"."""
    if verdict.error is not None:
        return f"{verdict.case}: {verdict.error}"
    at = f"[{', '.join(map(str, verdict.at))}]" if verdict.at else ""
    return f"{verdict.case}: {verdict.what}{at}" if verdict.what else ""


def _document(verdict: Any) -> dict[str, Any]:
    """JSON has no infinity: a result that is not a number, or no result, has the worst error null."""
    finite = verdict.worst < float("inf")
    return verdict._asdict() | {"worst": verdict.worst if finite else None, "holds": verdict.holds}
