"""The Triton kernels, run: on the GPU where there is one, by Triton's interpreter where that is switched on.

`make test` starts this folder in a session of its own with TRITON_INTERPRET=1; elsewhere, on a machine
without a GPU, its tests are not collected. Every allocation of a launcher is full of NaN and stands
between guard bands, and a masked load without `other=` reads NaN.
"""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, RUNNABLE
from torch._subclasses import FakeTensor

from gpukernels.kernels.device import INTERPRETING

collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE == "cuda" and "tests/kernels" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


if INTERPRETING:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _patch_lang, _patched = interpreter._patch_lang, set()

    def _patch_lang_once(function):
        """Calls of `@triton.jit` functions exchange `triton.language`'s members, which was half of a test's time."""
        languages = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        if languages <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(languages)
        scope = _patch_lang(function)
        scope._changes.clear()  # what is not restored stays
        return scope

    interpreter._patch_lang = _patch_lang_once
    # Looks for overflow of int32 in every sum, a tenth of the time, where no index can come near it.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # Programs run one after the other anyway, and wait for nothing.
    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda _semantic=None: None

    _masked_load = InterpreterBuilder.create_masked_load
    # By Triton's name of the element: how the interpreter holds it (bfloat16 as its bits), and the poison.
    _POISON = {
        "fp16": np.float16("nan"),
        "bf16": np.uint16(0x7FC0),
        "fp32": np.float32("nan"),
        "int32": np.int32(2**30),
        "int64": np.int64(2**60),
    }

    def _masked_load_or_poison(self, pointers, mask, other, *rest, **options):
        element = pointers.dtype.element_ty
        # Of a single element the interpreter takes an `other` that is 0 for None.
        if other is None and element.name in _POISON and mask.data.size > 1:
            other = TensorHandle(np.full(mask.data.shape, _POISON[element.name]), element)
        return _masked_load(self, pointers, mask, other, *rest, **options)

    InterpreterBuilder.create_masked_load = _masked_load_or_poison

BAND = 64  # elements on either side: a multiple of 16 bytes, so that what is inside stays aligned
POISON = 0xFF  # as every byte: NaN in the floating-point formats, -1 in the integers


@pytest.fixture(autouse=True)
def guarded_allocations(monkeypatch):
    """Launchers allocate with `torch.empty` and nothing else; this gives them poison between two bands."""
    allocate, stores = torch.empty, []

    def guarded(*shape, **options):
        probe = allocate(*shape, **options)
        if probe.device.type == "meta" or isinstance(probe, FakeTensor):
            return probe
        count, size = probe.numel(), probe.element_size()
        store = allocate((count + 2 * BAND) * size, dtype=torch.uint8, device=probe.device)
        store.fill_(POISON)
        stores.append((store, BAND * size))
        return store.view(probe.dtype)[BAND : BAND + count].view(probe.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    for store, band in stores:
        assert (store[:band] == POISON).all(), "a kernel wrote in front of its output"
        assert (store[-band:] == POISON).all(), "a kernel wrote behind its output"


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
