"""The GPU run: everything that is measured or checked on a GPU, in the order of its worth, within a time limit.

    python -m bench.gpu [--limit 540] [--only kernels] [--commit 0123abc] [--dry-run]

From a plain checkout, with no install step: compiles all kernels at once, runs the GPU tests, `verify`, the kernel
and the model benchmarks. After each part the results so far are written to bench/results/ as one JSON, one HTML and
one Markdown file, named by GPU and date, so that a run that is cut short leaves what it has.
"""

import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.parts import ROOT, Part, parts, run, shown
from bench.report import in_words, machine, show, write_json, write_text

LIMIT = 540  # seconds


def main(
    limit: Annotated[float, typer.Option(min=1, help="Seconds for all of it.")] = LIMIT,
    only: Annotated[list[str] | None, typer.Option(metavar="PART", help="Only this part; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the parts and their expected times.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the results go.")] = ROOT / "bench" / "results",
    commit: Annotated[str | None, typer.Option(help="What is measured, where git cannot say.")] = None,
) -> None:
    """Run the parts, one after the other, and write what they find."""
    known = parts()
    for name in only or ():
        if name not in [part.name for part in known]:
            _refuse(f"the part must be one of {', '.join(part.name for part in known)}, got {name!r}")
    wanted = [part for part in known if not only or part.name in only]
    if dry_run:
        listed(wanted, limit)
        return
    here = machine()
    here["commit"] = here.get("commit") or commit  # a copy of a checkout may have no .git
    if "gpu" not in here:
        _refuse("there is no NVIDIA GPU here (nvidia-smi finds none); --dry-run lists what would run")
    if not folder.is_dir():
        _refuse(f"there is no folder {folder}")
    for end in (signal.SIGTERM, signal.SIGHUP):  # so that a part does not outlive this
        signal.signal(end, lambda number, _: sys.exit(128 + number))
    try:
        measured(wanted, limit, folder, here)
    except (OSError, ValueError) as fault:  # before the first part
        _refuse(str(fault))


def listed(wanted: Sequence[Part], limit: float) -> None:
    """What would run, and for how long."""
    rows = []
    for part in wanted:
        missing = part.missing()
        note = f"not there: needs {', '.join(missing)}" if missing else ""
        rows.append((part.name, f"{part.expected:.0f} s", f"{min(part.most, limit):.0f} s", shown(part), note))
    columns = ("part", "expected", "at most", "command", "")
    show(f"The parts of a GPU run, in all {limit:.0f} s at most", columns, rows, width=150)
    expected = sum(part.expected for part in wanted if not part.missing())
    print(f"expected in all: {min(expected, limit):.0f} s" + (", the last ones cut short" if expected > limit else ""))


def measured(wanted: Sequence[Part], limit: float, folder: Path, here: dict[str, Any]) -> Path:
    """Runs the parts, and writes the three files before the first and after each; returns the JSON file.

    Parts that an earlier run of this GPU and day has in the file, and this one has not, stay there. While a part
    runs, the JSON has what it has found so far.

    Raises:
        OSError: the first files cannot be written.
        ValueError: the JSON file is there, and is something else.
    """
    end = time.monotonic() + limit
    stem = re.sub(r"[^a-z0-9]+", "-", here["gpu"]["name"].lower()).strip("-")
    path = folder / f"gpu-{stem}-{here['date']}.json"
    found = {part["name"]: part for part in _kept(path)}
    found |= {part.name: {"name": part.name, "command": shown(part), "state": "waiting"} for part in wanted}
    document = {"bench": "gpu", "machine": here, "limit": limit}

    def now() -> dict[str, Any]:
        return document | {"parts": list(found.values())}

    def keep(one: dict[str, Any]) -> None:
        found[one["name"]] = one | {"commit": here["commit"]}
        with _told():
            write_json(path, now())

    written(path, now())
    for part in wanted:
        try:
            keep(run(part, end - time.monotonic(), keep))
        finally:
            with _told():
                written(path, now())
        one = found[part.name]
        print(f"{part.name}: {one['state']}, {one.get('seconds', 0):.0f} s", flush=True)
    print(f"{path}\n{path.with_suffix('.html')}\n{path.with_suffix('.md')}")
    return path


def written(path: Path, document: dict[str, Any]) -> None:
    """The JSON first: the other two are made of it, and where one cannot be, the run goes on without."""
    from bench import gpu_page, readme

    write_json(path, document)
    with _told():
        write_text(path.with_suffix(".html"), gpu_page.page(document).html)
    with _told():
        text = f"# GPU run\n\n{in_words(document['machine'])}\n\n{readme.gpu_run(document)}\n"
        write_text(path.with_suffix(".md"), text)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong is said, and no end of the run: figures are there that cannot be had again."""
    try:
        yield
    except Exception as fault:
        print(f"not written: {type(fault).__name__}: {fault}", file=sys.stderr, flush=True)


def _kept(path: Path) -> list[dict[str, Any]]:
    """The parts of an earlier run."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} has no GPU run in it, and is in the way") from None


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
