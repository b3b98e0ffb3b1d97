"""A decode step in one cooperative launch, for a runtime that owns the parameters and the cache.

It is no op: it is made once for arrays that stay where they are. See `gpukernels.kernels.persistent.step` for what
it does, what was measured, and what is expected of it.
"""

from gpukernels.kernels.persistent.schedule import GIVEN, ScheduleError, Stage, check, decode_schedule
from gpukernels.kernels.persistent.step import MOST_ROWS, PersistentStep, why_not

__all__ = [
    "GIVEN",
    "MOST_ROWS",
    "PersistentStep",
    "ScheduleError",
    "Stage",
    "check",
    "decode_schedule",
    "why_not",
]
