"""Arrays that kernels write, between bands that they must not, and full of what must not be left there."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch._subclasses import FakeTensor

#: Elements on either side, rows of any model: what a mask lets through by mistake lands in them. A multiple of 16
#: bytes, so that what is inside stays aligned.
BAND = 1 << 16
POISON = 0xFF  # as every byte: NaN in the floating-point formats, -1 in the integers


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While this lasts, `torch.empty`, with which launchers allocate, gives poison between two bands of poison.

    Raises:
        AssertionError: at the end, if something was written into a band.
    """
    allocate, stores = torch.empty, []

    def poisoned(*shape, **options):
        probe = allocate(*shape, **options)
        if probe.device.type == "meta" or isinstance(probe, FakeTensor):
            return probe
        count, size = probe.numel(), probe.element_size()
        store = allocate((count + 2 * BAND) * size, dtype=torch.uint8, device=probe.device)
        store.fill_(POISON)
        stores.append((store, BAND * size))
        return store.view(probe.dtype)[BAND : BAND + count].view(probe.shape)

    with mock.patch.object(torch, "empty", poisoned):
        yield
    for store, band in stores:
        if not (store[:band] == POISON).all():
            raise AssertionError("a kernel wrote in front of its output")
        if not (store[-band:] == POISON).all():
            raise AssertionError("a kernel wrote behind its output")
