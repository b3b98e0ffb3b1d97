"""The Triton kernels, run: on the GPU where there is one, by Triton's interpreter where that is switched on.

`make test` starts this folder in a session of its own with TRITON_INTERPRET=1; elsewhere, on a machine
without a GPU, its tests are not collected. Every allocation of a launcher is full of NaN and stands
between guard bands, and a masked load without `other=` reads NaN.
"""

import pytest
import torch
from kernel_cases import DEVICE, EMULATE, RUNNABLE

from gpukernels.emulator import emulated
from gpukernels.verify.allocations import guarded

if EMULATE:  # from here on in this process
    _emulation = emulated(EMULATE)
    _emulation.__enter__()

collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE == "cuda" and "tests/kernels" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def guarded_allocations():
    with guarded():
        yield


@pytest.fixture(autouse=True)
def large_memory_is_given_back():
    """Others test on the same GPU, and what one process's cache keeps they cannot have."""
    yield
    if DEVICE == "cuda" and torch.cuda.memory_reserved() > 2 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
