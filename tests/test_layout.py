"""The arrows of the tree: who imports whom, what an import brings along, and that the ops match."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gpukernels
from gpukernels import numpy_ops, ops, torch_ops

ROOT = Path(__file__).parent.parent
PACKAGES = {"gpukernels", "model", "bench", "tests"}

#: What `model` may use of `gpukernels`: the modules that are public.
PUBLIC = {"ops", "cast", "compile_report", "dispatch", "emulator", "verify", "interop", "launches", "numbers", "gpus"}
PUBLIC |= {"persistent", "threads"}

MOST_LINES = 400


def files(*folders: str) -> list[Path]:
    """The Python files of some packages, by path."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def modules_of(folder: str) -> set[str]:
    """The names of a package's own modules and packages."""
    return {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` is a.b where that is a module."""
    package, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            inner = (
                modules_of(base.replace(".", "/")) if (ROOT / base.replace(".", "/") / "__init__.py").is_file() else ()
            )
            found |= {f"{base}.{alias.name}" if alias.name in inner else base for alias in node.names}
    return found


def top(name: str) -> str:
    return name.split(".")[0]


def test_no_two_files_of_tests_share_a_name():
    """Where there is a GPU all are collected together, and pytest imports a file by its name alone."""
    names = [path.name for path in files("tests") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", files("gpukernels", "model", "bench"), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_there(path):
    """Of our own, also where a function imports it when it is called."""
    ours = [ROOT / name.replace(".", "/") for name in imports(path) if top(name) in PACKAGES]
    assert all(each.with_suffix(".py").is_file() or (each / "__init__.py").is_file() for each in ours)


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    package = tmp_path / "gpukernels"
    package.mkdir()
    for name in ("__init__", "ops", "cast"):
        (package / f"{name}.py").touch()
    source = "import os, a.b as c\nfrom gpukernels import ops, linear\nfrom . import cast\nfrom .ops import x\n"
    (package / "here.py").write_text(source + "def f():\n    from torch.nn import functional\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    want = {"os", "a.b", "gpukernels.ops", "gpukernels", "gpukernels.cast", "torch.nn"}
    assert imports(package / "here.py") == want


@pytest.mark.parametrize("path", files("gpukernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_gpukernels_knows_nothing_about_models(path):
    assert not {top(name) for name in imports(path)} & {"model", "bench", "tests"}


@pytest.mark.parametrize("path", files("model"), ids=lambda path: str(path.relative_to(ROOT)))
def test_model_imports_public_modules_of_gpukernels_only(path):
    found = imports(path)
    assert not {top(name) for name in found} & {"bench", "tests"}
    kernels = {name for name in found if top(name) == "gpukernels"}
    assert kernels <= {"gpukernels", *(f"gpukernels.{name}" for name in PUBLIC)}


@pytest.mark.parametrize("path", files("bench"), ids=lambda path: str(path.relative_to(ROOT)))
def test_bench_does_not_import_the_tests(path):
    assert "tests" not in {top(name) for name in imports(path)}


NUMPY_SIDE = [
    *files("gpukernels/numpy_ops"),
    *(ROOT / "gpukernels/cast" / f"{name}.py" for name in ("host", "losses", "upload")),
    ROOT / "gpukernels/threads.py",
]


@pytest.mark.parametrize("path", NUMPY_SIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_numpy_side_imports_the_standard_library_and_numpy_only(path):
    foreign = {name for name in imports(path) if top(name) not in sys.stdlib_module_names | {"numpy"}}
    assert all(
        f"{name}.".startswith(("gpukernels.numpy_ops.", "gpukernels.cast.", "gpukernels.threads.")) for name in foreign
    )


GENERATE = """
import sys
import gpukernels, model
lm = model.load("tiny-gpt2", device="cpu")
assert lm.generate("And Moses", max_new_tokens=3, temperature=1.0, seed=0, stop="xyz").tokens
assert "".join(lm.stream("And Moses", max_new_tokens=2))
heavy = {name.split(".")[0] for name in sys.modules} & {"torch", "triton", "cupy", "transformers", "huggingface_hub"}
sys.exit(f"NumPy brought {heavy}" if heavy else 0)
"""


def test_generating_on_numpy_imports_neither_torch_nor_transformers_nor_the_hub(tmp_path):
    done = subprocess.run([sys.executable, "-c", GENERATE], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


PUBLIC_OPS = sorted(name for name in gpukernels.__all__ if callable(getattr(gpukernels, name)))


def test_the_public_ops_are_those_of_ops():
    defined = {name for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert set(PUBLIC_OPS) == defined
    assert all(getattr(gpukernels, name) is getattr(ops, name) for name in defined)


@pytest.mark.parametrize("name", PUBLIC_OPS)
@pytest.mark.parametrize("module", [numpy_ops, torch_ops], ids=lambda module: module.__name__)
def test_an_op_has_one_signature_everywhere(name, module):
    def parameters(function):
        return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]

    assert parameters(getattr(module, name)) == parameters(getattr(ops, name))


@pytest.mark.parametrize("path", files(*sorted(PACKAGES)), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_can_hold(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES
