"""The tests that need a GPU, for a run that may be cut short: what failed is in a file as soon as it has.

python -m bench.gpu_tests [--json FILE] [PYTEST'S OPTIONS]
"""

import os
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.parts import ROOT
from bench.report import write_json

_OFTEN = 2.0  # seconds between two files, while nothing fails
_PROCESSES = 16  # that compile and test side by side; each has CUDA's context, half a GiB

_TESTS = ROOT / "tests"
#: What cannot be imported here (a judge that is not installed) does not keep the rest from running.
OPTIONS = ("-q", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "bench.gpu_tests")

_failed = False  # the test that is under way


def files() -> list[str]:
    """Those with tests for a GPU. What the others import would take its time in every process."""
    marked = (path for path in sorted(_TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8"))
    return [*map(str, marked), str(_TESTS / "kernels")]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """What nothing but a GPU can run comes first, then the first test of every file, the second, and so on.

    The persistent step comes last: a barrier that is wrong would wait for ever.
    """
    met: Counter[Path] = Counter()

    def place(item: Any) -> tuple[bool, bool, int]:
        met[item.path] += 1
        return "persistent" in item.name, not item.path.stem.endswith("_gpu"), met[item.path]

    items.sort(key=place)


def pytest_runtest_logreport(report: Any) -> None:
    global _failed
    _failed = report.failed or (_failed and report.when != "setup")


def pytest_runtest_logfinish() -> None:
    if _failed and "PYTEST_XDIST_WORKER" in os.environ and not _alive():
        os._exit(1)


def _alive() -> bool:
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Recorder:
    """A pytest plugin: the numbers of tests by outcome, and for each that failed its name and what it said."""

    def __init__(self, file: Path | None):
        self._file, self._written = file, 0.0
        self.document: dict[str, Any] = {"bench": "tests", "passed": 0, "failed": 0, "skipped": 0, "failures": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped or report.when == "call":
            self.document[report.outcome] += 1
        self._write(now=report.failed)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
            self._write(now=True)

    def pytest_sessionfinish(self) -> None:
        self._write(now=True)

    def _failed(self, report: Any) -> None:
        lines = str(report.longrepr).splitlines()
        # pytest marks what an exception said with an E.
        said = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
        self.document["failed"] += 1
        self.document["failures"].append({"test": report.nodeid, "said": " ".join(said)[:300]})

    def _write(self, *, now: bool) -> None:
        if self._file is not None and (now or time.monotonic() > self._written + _OFTEN):
            write_json(self._file, self.document)
            self._written = time.monotonic()


def main(arguments: list[str]) -> int:
    """pytest's exit code."""
    import pytest

    file = None
    if arguments[:1] == ["--json"]:
        file, arguments = Path(arguments[1]), arguments[2:]
    processes = str(min(_PROCESSES, os.cpu_count() or 1))
    # One by one, in their order.
    spread = ("--numprocesses", processes, "--maxschedchunk", "1") if find_spec("xdist") else ()
    return pytest.main([*OPTIONS, *spread, *(arguments or files())], plugins=[Recorder(file)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
