"""Compiled kernels, run without a GPU: the PTX of each launch is executed on the CPU, thread by thread.

    with emulated(90):  # an H100
        y = gpukernels.layer_norm(x, weight, bias)  # tensors of the CPU

Triton's interpreter runs a kernel's source; this runs what its compiler made of it for one compute capability, with
that GPU's tiles: tensor cores, swizzled shared memory, asynchronous copies, TMA. Every access is checked: its
alignment, its bounds, and whether another thread may touch the same bytes at the same time.
"""

import contextlib
from collections.abc import Iterator

from triton.runtime import driver

from gpukernels.compile_report.chips import CHIPS
from gpukernels.emulator.launching import EmulatingDriver
from gpukernels.kernels.device import INTERPRETING
from gpukernels.ops.checks import kernel_devices

#: The GPUs whose tensor cores are written down here: names by compute capability.
CAPABILITIES = {each: CHIPS[each].name for each in (80, 89, 90)}


@contextlib.contextmanager
def emulated(capability: int, *, seed: int | None = 0, multiprocessors: int | None = None) -> Iterator[EmulatingDriver]:
    """While this lasts, ops on CPU tensors run as their kernels compiled for this GPU would.

    Args:
        capability: 80 (A100), 89 (RTX 4090) or 90 (H100).
        seed: of the errors of approximate instructions, which are drawn within what the PTX ISA allows; None: none.
        multiprocessors: how many the GPU has; default as many as that chip. With a few, programs that take one tile
            after the other do so at small sizes too.

    Yields the driver, whose `ran` counts launches by kernel.

    Numerics: tensor cores add in float32 and cut off, as they do; ex2, division and the like are off by as much as
    they may be. Slow: a launch takes a tenth of a second to some seconds. Programs run in batches, in order, and a
    launch ends before the next one starts.

    What it does not see: races in shared memory, which Triton's compiler keeps apart; products and tiles in the
    background that are used before they are waited for (of `cp.async` it does); fences that are missing.

    Raises:
        ValueError: another capability.
        RuntimeError: Triton interprets its kernels in this process (TRITON_INTERPRET=1).
        MemoryFault: an access outside the launch's arrays, or one that is not aligned.
        Race: two threads touch the same bytes with nothing between them, and one of them writes.
        Unsupported: an instruction, or a form of one, that is not known here.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"emulated: capability must be one of {', '.join(map(str, CAPABILITIES))}, got {capability!r}")
    if INTERPRETING:
        raise RuntimeError("emulated: kernels are interpreted in this process; start it without TRITON_INTERPRET")
    before, new = driver._active, "cpu" not in kernel_devices
    ours = EmulatingDriver(capability, seed, multiprocessors)
    driver.set_active(ours)
    kernel_devices.add("cpu")
    try:
        yield ours
    finally:
        driver.set_active(before)
        if new:
            kernel_devices.discard("cpu")
