"""What `make test` starts: the same two sessions everywhere, and where there is a GPU a third one that sees it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Writes down how it is called; asked for a GPU, it says what it is told to.
PYTHON = """#!/bin/sh
echo "${CUDA_VISIBLE_DEVICES-all} ${TRITON_INTERPRET-0} $*" >> LOG
case "$*" in
    *cuda.is_available*) exit $NO_GPU;;
    *"$FAILS"*) exit 1;;
esac
"""


@pytest.fixture
def made(tmp_path):
    """Runs `make test` with a stand-in for the environment: its exit code, and the sessions that it started."""
    log = tmp_path / "log"
    (tmp_path / "bin").mkdir()
    for name in ("python", "ruff"):
        (tmp_path / "bin" / name).write_text(PYTHON.replace("LOG", str(log)) if name == "python" else "#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".installed").touch()

    def go(gpu: bool, fails: str = "nothing") -> tuple[int, list[str]]:
        log.write_text("")
        told = {"NO_GPU": str(int(not gpu)), "FAILS": fails}
        hidden = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | told
        command = ["make", "test", f"TEST={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, [line for line in log.read_text().splitlines() if " -m " in line]

    return go


def test_a_gpu_is_hidden_from_the_sessions_that_need_none_and_has_one_of_its_own(made):
    code, sessions = made(gpu=True)
    assert code == 0
    assert [each.split(" -m ")[0] for each in sessions] == [" 0", " 1", "all 0"]
    assert [each.split(" -m ")[1].split()[0] for each in sessions] == ["pytest", "pytest", "bench.gpu_tests"]


# pip refuses the first install, as where torch's build asks for another Triton; `python -m venv FOLDER` makes this.
REFUSING = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p $3/bin && cp $0 $3/bin/python;;
    *"--constraint constraints.txt"*) echo "ERROR: WHY" >&2; exit 1;;
    *"pip install"*) echo "$*" > LOG;;
esac
"""


@pytest.mark.parametrize(("why", "installs"), [("ResolutionImpossible", True), ("no network", False)])
def test_where_torch_contradicts_the_tests_triton_an_older_one_is_taken(tmp_path, why, installs):
    python, log, folder = tmp_path / "python", tmp_path / "log", tmp_path / "made"
    python.write_text(REFUSING.replace("LOG", str(log)).replace("WHY", why))
    python.chmod(0o755)
    command = ["make", f"{folder}/.installed", f"PYTHON={python}", f"TEST={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0, log.exists()) == (installs, installs)
    if installs:
        taken = (folder / "constraints.txt").read_text()
        assert f"--constraint {folder}/constraints.txt" in log.read_text()
        assert "torch==2.11.0\n" in taken
        assert "triton==3.6.0\n" in taken
        assert "nvidia" not in taken
    else:
        assert "no network" in done.stderr


def test_without_a_gpu_there_are_the_same_two(made):
    code, sessions = made(gpu=False)
    assert (code, sessions) == (0, made(gpu=True)[1][:2])


@pytest.mark.parametrize("fails", ["-m pytest --numprocesses auto", "tests/kernels", "bench.gpu_tests"])
def test_a_session_that_fails_is_a_failure(made, fails):
    assert made(gpu=True, fails=fails)[0] != 0
