"""`gpukernels verify --quick` on this GPU, for a run that may be cut short: its rows are in a file op by op.

python -m bench.verifying --json FILE
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.report import machine, write_json


def main(json_file: Annotated[Path, typer.Option("--json", help="Write the rows here, op by op.")]) -> None:
    """Verify every op; exit code 1 if an error is beyond its bound."""
    import torch

    if not torch.cuda.is_available():
        print("error: there is no CUDA GPU here", file=sys.stderr)
        sys.exit(2)
    verified(json_file, torch.device("cuda", torch.cuda.current_device()))


def verified(json_file: Path, device: Any) -> None:
    """Writes a row for each op, dtype and way, the broken ones first, and prints those."""
    from gpukernels.verify import DTYPES, OPS, gather

    rows: list[dict[str, Any]] = []
    document = {"bench": "verify", "machine": machine(), "ops": len(OPS), "rows": rows}
    write_json(json_file, document)
    for op, verdicts in gather(list(OPS), DTYPES, device, quick=True):
        for verdict in verdicts:
            broken = "" if verdict.holds else (verdict.error or "beyond its bound")
            row = {"op": op, "dtype": verdict.dtype, "way": verdict.way, "cases": verdict.cases, "broken": broken}
            row |= {"worst": verdict.worst, "case": verdict.case, "what": verdict.what}
            rows.append(row)
            if broken:
                print(f"{op} {verdict.dtype} {verdict.way}: {broken}, {verdict.worst:.3g} at {verdict.case}")
        rows.sort(key=lambda row: not row["broken"])
        write_json(json_file, document)
    print(f"{sum(row['cases'] for row in rows)} cases, {sum(bool(row['broken']) for row in rows)} rows broken")
    if any(row["broken"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
