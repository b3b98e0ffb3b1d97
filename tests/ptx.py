"""Small kernels in PTX, run by the emulator."""

import numpy as np

from gpukernels.emulator.code import Code
from gpukernels.emulator.launching import execute
from gpukernels.emulator.ptx import parse

_TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	.loc	1 7 1
	ld.param.b64 	%rd0, [kernel_param_0];
	ld.param.b64 	%rd1, [kernel_param_1];
	mov.u32 	%r90, %tid.x;
	mov.u32 	%r91, %ctaid.x;
	mov.u32 	%r92, %ntid.x;
	mad.lo.s32 	%r93, %r91, %r92, %r90;
	mad.wide.u32 	%rd2, %r93, 16, %rd0;
	mad.wide.u32 	%rd3, %r93, 16, %rd1;
	{body}
	ret;
}}
"""

_LOAD = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];"
_STORE = "st.global.v4.b32 [%rd3], {%r5, %r6, %r7, %r8};"


def run(body, given=None, *, threads=32, blocks=1, shared=0, bare=False):
    """What a kernel writes: (blocks * threads, 4) of uint32, 0 where it does not.

    Each thread has %r90 (itself), %r91 (its block), %r93 (itself in the grid), addresses %rd2 of its four words of
    `given` (loaded to %r1 to %r4) and %rd3 of its four words of the result (stored from %r5 to %r8, which are 0 first).
    bare: nothing is loaded, cleared or stored.
    """
    count = blocks * threads
    source, result = np.zeros((count, 4), np.uint32), np.zeros((count, 4), np.uint32)
    if given is not None:
        source[: len(given), : given.shape[1]] = given
    zeros = " ".join(f"mov.b32 %r{i}, 0;" for i in range(5, 9))
    whole = body if bare else f"{_LOAD}\n{zeros}\n{body}\n{_STORE}"
    code = Code(parse(_TEXT.format(body=whole)))
    ranges = [(each.ctypes.data, each.nbytes) for each in (source, result)]
    parameters = [np.uint64(start) for start, _ in ranges]
    execute(code, (blocks, 1, 1), threads, parameters, ranges, shared=shared)
    return result
