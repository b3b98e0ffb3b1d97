"""What kernels compile to, for any NVIDIA GPU, without one.

`record` runs a function under a stand-in for Triton's driver: every launch goes through the real
launcher, is specialised and compiled as it would be on that GPU, and is written down instead of run.
The function gets tensors on torch's `meta` device, which have shapes and no memory.

    launches = record(lambda: gpukernels.layer_norm(x, weight), capability=90)
    for launch in launches:
        print(launch.kernel, launch.grid, launch.compiled.registers, launch.compiled.spilled_bytes)

`rows` makes a report of a recording, and `gather` reports of many.
"""

from gpukernels.compile_report.binary import Compiled
from gpukernels.compile_report.chips import CHIPS, Chip, Occupancy, occupancy
from gpukernels.compile_report.cost import Cost, cost
from gpukernels.compile_report.cuda_source import compile_cuda
from gpukernels.compile_report.parallel import gather
from gpukernels.compile_report.recording import Launch, record, stand_in
from gpukernels.compile_report.report import Row, rows
from gpukernels.gpus import GPUS, Gpu, gpu_named, roofline

__all__ = [
    "CHIPS",
    "GPUS",
    "Chip",
    "Compiled",
    "Cost",
    "Gpu",
    "Launch",
    "Occupancy",
    "Row",
    "compile_cuda",
    "cost",
    "gather",
    "gpu_named",
    "occupancy",
    "record",
    "roofline",
    "rows",
    "stand_in",
]
