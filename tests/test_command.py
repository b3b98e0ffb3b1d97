"""Where the installed command begins: Ctrl-C is met from there on, whatever is being imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY, FUNCTION = PROJECT["project"]["scripts"]["gpukernels"].split(":")

# As the script that pip writes, but that somebody presses Ctrl-C while the module {at} is looked for.
START = f"""
import os, signal, sys

class Interrupts:
    def find_spec(name, path, target=None):
        if name == {{at!r}}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts)
from {ENTRY} import {FUNCTION}
sys.exit({FUNCTION}())
"""


def python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, "--version"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "module",
    # NumPy makes an ImportError of whatever ends the import of its own modules.
    ["model", "gpukernels", "numpy", "numpy._core.multiarray", "tokenizers", "typer", "model.cli.app"],
)
def test_ctrl_c_while_python_imports_is_130_without_a_traceback(module):
    done = python(START.format(at=module))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_that_is_ignored_stays_so():
    """As under nohup."""
    done = python("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + START.format(at="numpy"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gpukernels ")


def test_the_entry_imports_nothing_that_python_has_not_imported_itself():
    done = python(f"import sys, os; before = set(sys.modules); import {ENTRY}; print(*(set(sys.modules) - before))")
    assert done.stdout.split() == [ENTRY]


def test_the_entry_is_installed_with_the_packages():
    assert ENTRY in PROJECT["tool"]["setuptools"]["py-modules"]


# What is written when the command ends, and piece by piece.
SAID = [("check", "tiny-gpt2"), ("info", "tiny-gpt2"), ("generate", "And", "--max-new-tokens", "2", "--quiet")]


def without_a_reader(gone, said):
    """What a command says where nobody reads "stdout" or "stderr": on the other of them, and its exit code."""
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-m", "model.cli", *said], cwd=ROOT, **streams) as command:
        getattr(command, gone).close()
        other = command.stderr if gone == "stdout" else command.stdout
        return other.read(), command.wait(60)


@pytest.mark.parametrize("said", SAID, ids=lambda said: said[0])
def test_a_reader_who_has_gone_is_141_without_a_word(said):
    """And not 1, which is `check`'s for a model that would not load."""
    assert without_a_reader("stdout", said) == (b"", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("said", SAID, ids=lambda said: said[0])
def test_a_disk_that_is_full_is_one_line(said):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "model.cli", *said], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.stderr, done.returncode) == (b"error: output: No space left on device\n", 2)


@pytest.mark.parametrize("said", [("check", "no/such/folder"), ("check", "--no-such-option")], ids=["model", "option"])
def test_a_mistake_is_2_where_nobody_reads_what_it_is(said):
    """As above."""
    assert without_a_reader("stderr", said) == (b"", 2)
