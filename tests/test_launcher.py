"""Launches as a GPU gets them: by Triton's own CUDA driver and launcher, over a libcuda that runs nothing.

`compile_report` records launches in the place of both. What it writes down must be what the driver is then asked
for: grids, threads, shared memory, dependent and cooperative launches, and tensor maps that can be encoded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import triton

from gpukernels.compile_report import record
from model.workloads import WORKLOADS

COMPILER = shutil.which("gcc")
HEADERS = Path(sysconfig.get_paths()["include"]) / "Python.h"

pytestmark = [
    pytest.mark.skipif(COMPILER is None or not HEADERS.exists(), reason="launchers are compiled with gcc and Python.h"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is here launches"),
]

# In a process of its own, which finds the library before any other. Tensors have no data, as when they are recorded.
LAUNCH = """
import sys
import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

torch.cuda.get_device_capability = lambda device=None: (9, 0)
cuda = CudaDriver()
cuda.get_current_device, cuda.get_current_stream = lambda: 0, lambda device: 0
driver.set_active(cuda)

from gpukernels.compile_report.recording import _CallLaunchers
from model.workloads import WORKLOADS

with _CallLaunchers():
    WORKLOADS[sys.argv[1]]()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The folder with libcuda.so.1."""
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", source]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.mark.parametrize("name", ["gpt2/prefill", "gpt2/decode-1", "gpt2/persistent", "gpt2/training"])
def test_what_is_recorded_is_what_is_launched(name, library):
    paths = {"LD_LIBRARY_PATH": str(library), "TRITON_LIBCUDA_PATH": str(library)}
    command = [sys.executable, "-c", LAUNCH, name]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    launched = [json.loads(line) for line in done.stdout.splitlines()]
    recorded = [
        [
            *each.grid, 32 * each.compiled.num_warps, each.compiled.shared_memory,
            int(each.arguments.get("DEPENDENT", False)), int(each.cooperative),
        ]
        for each in record(WORKLOADS[name], capability=90)
    ]  # fmt: skip
    assert launched == recorded
    assert any(each[5] for each in launched) == (name == "gpt2/decode-1")
    assert any(each[6] for each in launched) == (name == "gpt2/persistent")
