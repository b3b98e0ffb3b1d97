"""The GPU run, simulated: parts that are short, long, broken or not there; what is left of them on disk."""

import json
import re
import subprocess
import time
import types
from pathlib import Path

import pytest
from plots import PLOT
from typer.testing import CliRunner

from bench import compiling, gpu, gpu_page, gpu_tests, report, verifying
from bench.parts import JSON, Part, parts, run

HERE = {
    "processor": "a processor", "cores": 2, "python": "3.12.0", "versions": {"torch": "2.11.0"}, "date": "2026-01-02",
    "commit": "0123456789ab",
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "capability": "9.0", "memory_mib": 81559},
}  # fmt: skip


def python(name, code, **more):
    """A part that starts in a moment: without site-packages."""
    return Part(name, ("-S", "-c", code), 1, more.pop("most", 60), **more)


KERNELS = {
    "bench": "kernels", "device": "NVIDIA H100 80GB HBM3", "machine": HERE, "rounds": 3,
    "roofs": {"bandwidth": 3e12, "tensor_flops": 7e14},
    "targets": [],
    "rows": [
        {
            "op": "gelu", "model": "GPT-2", "shape": "8 x 9", "size": 8, "dtype": "float16", "direction": "forward",
            "provider": provider, "error": 1e-4, "of_bound": 0.1, "seconds": seconds, "seconds_20_80": [seconds] * 2,
            "launched_seconds": 1e-4, "rate": 1.5, "unit": "TB/s", "of_roof": 0.5, "peak_bytes": 9, "graph": True,
            "bytes": 100, "flops": 0, "quick": True, **more,
        }
        for provider, seconds, more in (("ours", 1e-5, {}), ("torch", 2e-5, {"speedup_of_ours": 2.0}))
    ],
}  # fmt: skip

# Writes its figures, starts a process of its own, says which, and stays.
STAYS = f"""
import json, subprocess, sys, time
json.dump({KERNELS!r}, open(sys.argv[1], "w"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_run_of_two_seconds_leaves_what_it_has(tmp_path, capsys):
    wanted = [
        python("first", """print('words'); print('{"bench": "x", "rows": [{"a": 1.5, "b": "c"}]}')"""),
        python("broken", "import sys; print('what is wrong'); sys.exit(3)"),
        python("absent", "", needs=("no_such_module", "json")),
        Part("kernels", ("-S", "-c", STAYS, JSON), 1, 600),
        python("last", "print('never')"),
    ]  # fmt: skip
    start = time.monotonic()
    path = gpu.measured(wanted, 2.0, tmp_path, HERE)
    assert time.monotonic() - start < 300  # not the 600 seconds of the part; pages are drawn too
    assert path.name == "gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    document = json.loads(path.read_text())
    found = {part["name"]: part for part in document["parts"]}
    assert [part["state"] for part in document["parts"]] == ["done", "failed", "not there", "cut short", "no time"]
    assert found["first"]["result"] == {"bench": "x", "rows": [{"a": 1.5, "b": "c"}]}
    assert found["first"]["tail"] == ["words"]
    assert found["broken"]["code"] == 3
    assert found["broken"]["tail"] == ["what is wrong"]
    assert found["absent"]["why"] == "needs no_such_module"
    assert found["kernels"]["result"] == KERNELS  # what it had written before its time was up
    assert document["machine"] == HERE
    child = int(found["kernels"]["tail"][0].split()[1])
    assert ended(child)
    markdown = path.with_suffix(".md").read_text()
    assert "driver 580.1" in markdown
    assert "| gelu | GPT-2, 8 x 9 | forward | 0.0100 | 1.50 TB/s | 50% | torch | 2.00 x | 1e-04 |" in markdown
    assert "| few-row product, over cuBLAS | at least 2 | not yet measured | - |" in markdown
    assert "| 1.50 | c |" in markdown
    html = path.with_suffix(".html").read_text()
    assert PLOT in html
    assert "what is wrong" in html
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".html", ".json", ".md"]


def ended(process: int) -> bool:
    """Whether it is gone, or only waits to be collected."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_results_are_written_before_the_first_part_and_after_each(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(gpu, "written", lambda path, document: states.append([p["state"] for p in document["parts"]]))
    gpu.measured([python("one", ""), python("two", "")], 60, tmp_path, HERE)
    assert states == [["waiting", "waiting"], ["done", "waiting"], ["done", "done"]]


def test_what_a_part_has_found_is_in_the_file_while_it_runs_and_when_the_run_is_ended(tmp_path, monkeypatch):
    """As by Ctrl-C: the third look ends it."""
    seen, path = [], tmp_path / "gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    code = 'import sys, time; open(sys.argv[1], \'w\').write(\'{"bench": "x", "rows": []}\'); time.sleep(600)'
    wait = subprocess.Popen.wait

    def looked(process, timeout=None):
        if timeout == 0.5:  # a look, and not the end
            part = json.loads(path.read_text())["parts"][0]
            seen.append((part["state"], part.get("result")))
            if seen[-1][0] == "running":
                raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr("bench.parts._LOOK", 0.5)
    monkeypatch.setattr(subprocess.Popen, "wait", looked)
    with pytest.raises(KeyboardInterrupt):
        gpu.measured([Part("long", ("-S", "-c", code, JSON), 1, 60), python("two", "")], 60, tmp_path, HERE)
    assert seen[-1] == ("running", {"bench": "x", "rows": []})
    states = [(part["state"], part.get("result")) for part in json.loads(path.read_text())["parts"]]
    assert states == [("cut short", {"bench": "x", "rows": []}), ("waiting", None)]
    assert "| long | cut short |" in path.with_suffix(".md").read_text()


def test_a_page_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fails(document):
        raise ValueError("cannot convert float NaN to integer")

    monkeypatch.setattr(gpu_page, "page", fails)
    path = gpu.measured([python("one", "print(1)")], 60, tmp_path, HERE)
    assert json.loads(path.read_text())["parts"][0]["state"] == "done"
    assert "| one | done |" in path.with_suffix(".md").read_text()
    assert "not written: ValueError: cannot convert" in capsys.readouterr().err


def test_a_full_disk_in_the_middle_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    write, left = gpu.write_json, iter([True, False, False, True, True])

    def full(file, document):
        if not next(left):
            raise OSError(28, "No space left on device")
        write(file, document)

    monkeypatch.setattr(gpu, "write_json", full)
    path = gpu.measured([python("one", "print(1)"), python("two", "")], 60, tmp_path, HERE)
    assert [part["state"] for part in json.loads(path.read_text())["parts"]] == ["done", "done"]
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_failing_tests_are_told_as_they_fail(tmp_path):
    def report_of(outcome, when="call", longrepr=None):
        failed, skipped = outcome == "failed", outcome == "skipped"
        more = {"failed": failed, "skipped": skipped, "longrepr": longrepr, "nodeid": "tests/test_x.py::test_y"}
        return types.SimpleNamespace(outcome=outcome, when=when, **more)

    recorder = gpu_tests.Recorder(tmp_path / "t.json")
    wrong = "def test_y():\n>   assert a == b\nE   assert 1 == 2\nE    +  where 1 = f()"
    for each in (
        *(report_of("passed", when) for when in ("setup", "call", "teardown")),
        report_of("skipped", "setup"),
        report_of("failed", "call", wrong),
    ):
        recorder.pytest_runtest_logreport(each)
    recorder.pytest_collectreport(report_of("failed", longrepr="ImportError: no judge"))
    document = json.loads((tmp_path / "t.json").read_text())
    assert [document[key] for key in ("passed", "failed", "skipped")] == [1, 2, 1]
    said = [each["said"] for each in document["failures"]]
    assert said == ["assert 1 == 2 +  where 1 = f()", "ImportError: no judge"]


def test_the_gpus_tests_are_those_that_are_marked():
    """Every file with a mark, and the folder that marks its tests by itself."""
    names = [Path(file).name for file in gpu_tests.files()]
    assert {"test_decoder_gpu.py", "test_upload_gpu.py", "test_interop.py", "test_registration.py"} < set(names)
    assert names[-1] == "kernels"
    assert "test_bench_faults.py" not in names
    elsewhere = re.compile(r"^from kernel_cases import .*\bDEVICE\b", re.MULTILINE)  # where there is a GPU
    uses = {path.name for path in Path(__file__).parent.glob("test_*.py") if elsewhere.search(path.read_text())}
    assert len(uses) >= 3
    assert uses <= set(names)


def test_what_only_a_gpu_can_run_is_first_and_every_file_is_met_early():
    files = ("kernels/test_a.py", "kernels/test_b.py", "test_c_gpu.py", "test_d.py")
    names = ("test_one", "test_a_persistent_step", "test_two")
    items = [types.SimpleNamespace(path=Path(file), name=name) for file in files for name in names]
    gpu_tests.pytest_collection_modifyitems(items)
    found = [f"{each.path.stem[5:]} {each.name[5:]}" for each in items]
    assert found[:8] == ["c_gpu one", "c_gpu two", "a one", "b one", "d one", "a two", "b two", "d two"]
    assert all("persistent" in each for each in found[8:])


def test_what_is_verified_is_in_the_file_op_by_op(tmp_path, monkeypatch, capsys):
    from gpukernels import verify

    found = [
        ("gelu", [verify.Verdict("gelu", "float16", "forward", 9, 0.4, "x (5, 129)", "y", (1, 2))]),
        ("rope", [verify.Verdict("rope", "float32", "forward", 3, float("inf"), "x (2, 3)", "", (), "it broke")]),
    ]
    monkeypatch.setattr(verify, "gather", lambda ops, dtypes, device, quick: iter(found))
    with pytest.raises(SystemExit) as end:
        verifying.verified(tmp_path / "v.json", None)
    assert end.value.code == 1
    rows = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert [(row["op"], row["worst"], row["broken"]) for row in rows] == [("rope", None, "it broke"), ("gelu", 0.4, "")]
    assert "rope float32 forward: it broke, inf at x (2, 3)" in capsys.readouterr().out


def test_parts_of_the_same_day_stay(tmp_path):
    gpu.measured([python("one", "print(1)"), python("two", "print(2)")], 60, tmp_path, HERE)
    path = gpu.measured([python("two", "print(3)"), python("three", "")], 60, tmp_path, HERE | {"commit": "fedcba"})
    parts = json.loads(path.read_text())["parts"]
    assert [(part["name"], part["tail"], part["commit"]) for part in parts] == [
        ("one", ["1"], "0123456789ab"), ("two", ["3"], "fedcba"), ("three", [], "fedcba"),
    ]  # fmt: skip


def test_a_copy_of_a_checkout_is_told_what_commit_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda: HERE | {"commit": None})
    monkeypatch.setattr(gpu, "parts", lambda: [python("one", "")])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    gpu.main(limit=60, folder=tmp_path, commit="fedcba")
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["machine"]["commit"] == document["parts"][0]["commit"] == "fedcba"
    assert report.in_words(HERE | {"commit": None}).endswith("2026-01-02; commit unknown")


def test_a_part_has_its_own_longest_time():
    found = run(python("long", "import time; time.sleep(600)", most=0.3), 60)
    assert found["state"] == "cut short"
    assert found["seconds"] < 10


def test_what_a_part_has_said_is_there_when_its_time_is_up(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    found = run(python("long", "import time; print('this far'); time.sleep(600)", most=2), 60)
    assert found["state"] == "cut short"
    assert found["tail"] == ["this far"]


def test_figures_are_found_in_front_of_what_a_library_says_at_the_end():
    code = """
import atexit, os
atexit.register(os.write, 2, b"W1127 a context is destroyed\\n")
print("words")
print('{"bench": "x", "rows": []}', flush=True)
"""
    found = run(python("one", code), 60)
    assert found["result"] == {"bench": "x", "rows": []}
    assert found["tail"] == ["words", "W1127 a context is destroyed"]


def test_a_part_runs_from_a_plain_checkout(tmp_path):
    found = run(Part("where", ("-c", "import bench; print(bench.__file__)"), 1, 60), 60)
    assert Path(found["tail"][-1]).parents[1] == Path(__file__).parents[1]


def test_the_dry_run_lists_every_part(capsys):
    gpu.main(dry_run=True)
    text = capsys.readouterr().out
    for name in (
        "compile",
        "tests",
        "verify",
        "kernels",
        "generate",
        "stages",
        "memory",
        "train",
        "persistent",
        "compiled",
    ):
        assert f"│ {name} " in text
    assert "expected in all: " in text
    assert all(part.expected <= part.most for part in parts())
    first = [part.name for part in parts()]
    assert first.index("compile") < first.index("tests") < first.index("kernels") < first.index("generate")


@pytest.mark.parametrize("held", ["not JSON", "[1]", '{"bench": "kernels"}'])
def test_a_file_that_is_something_else_is_not_written_over(tmp_path, held):
    path = tmp_path / "gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    path.write_text(held)
    with pytest.raises(ValueError, match="has no GPU run in it, and is in the way"):
        gpu.measured([python("one", "")], 60, tmp_path, HERE)
    assert path.read_text() == held


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--only", "everything"], "the part must be one of compile, tests, "),
        (["--folder", "nowhere"], "there is no folder nowhere"),
        ([], "there is no NVIDIA GPU here (nvidia-smi finds none); --dry-run lists"),
    ],
)
def test_mistakes_are_one_line(arguments, problem, monkeypatch):
    import typer

    here = {"machine": HERE} if "--folder" in arguments else {"machine": {"date": "2026-01-02"}}
    monkeypatch.setattr(gpu, "machine", lambda: here["machine"])
    app = typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {problem}")
    assert result.stderr.count("\n") == 1


def test_kernels_are_compiled_in_processes_of_their_own(capsys):
    compiling.main(capability=80, jobs=1, op=["gelu"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["calls"], document["binaries"], document["faults"]) == (1, 2, {})
    with pytest.raises(SystemExit):
        compiling.main(capability=70)
    assert capsys.readouterr().err == "error: capability must be one of 80, 89, 90, 100, got 70\n"


def test_what_is_said_of_a_machine(monkeypatch):
    said = {"nvidia-smi": "NVIDIA H100 80GB HBM3, 580.159.03, 9.0, 81559", "git": "0123456789ab"}
    monkeypatch.setattr(report, "_said", lambda command, *arguments: said[command])
    found = report.machine()
    assert found["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "580.159.03", "capability": "9.0", "memory_mib": 81559,
    }  # fmt: skip
    assert found["commit"] == "0123456789ab+"
    words = report.in_words(found)
    assert words.startswith("NVIDIA H100 80GB HBM3, 80 GiB, driver 580.159.03; ")
    assert "numpy " in words
    for strange in (None, "NVIDIA GB10, 580.1, 12.1, [N/A]", "No devices were found"):
        said["nvidia-smi"] = strange
        monkeypatch.setattr(report, "_DRIVER", Path("/nowhere"))
        assert "gpu" not in report.machine()
    said["nvidia-smi"] = None
    monkeypatch.setattr(report, "_DRIVER", Path("/nowhere"))
    assert "gpu" not in report.machine()
