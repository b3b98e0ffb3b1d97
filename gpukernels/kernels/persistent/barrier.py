"""A barrier between all programs of a cooperative launch, which are on the GPU together.

A counter in device memory only grows: every program adds 1 when it arrives, and waits until it shows what all
programs have added up to then. Nobody sets it back, so there is no moment at which one could be too late. What it
showed when a launch began, each program finds by itself: launches add the same number each, and while one runs
the counter is not yet a launch further. It has 64 bits: 8,000 a token last for 10^15 tokens.

Arriving is a release and waiting an acquire, both for the whole GPU, by one thread of a program; the barriers of
the block on either side of it pass that on to the others. So what a program has stored before it arrived, every
program sees that has waited, and old lines of the first-level cache are gone.

On an H100, 2026-11-22: 0.97 microseconds with 132 programs, and polling with volatile loads was slower.
"""

import triton
import triton.language as tl


@triton.jit
def launch_target(counter_ptr, arrivals):
    """What the counter showed when this launch began, of which each one adds `arrivals`."""
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") // arrivals * arrivals


@triton.jit
def arrive(counter_ptr):
    """This program has stored what it had to store."""
    tl.debug_barrier()  # all of its threads have
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target):
    """Until so many have arrived."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
