"""The emulator: what instructions mean, threads that branch apart, and accesses that are refused."""

import math
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import run

from gpukernels.compile_report.chips import CHIPS
from gpukernels.emulator import CAPABILITIES, emulated, machine
from gpukernels.emulator.faults import MemoryFault, Race, Unsupported
from gpukernels.emulator.order import ranks
from gpukernels.kernels.device import gpu


def f32(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def f16(x: float) -> int:
    return struct.unpack("<H", struct.pack("<e", x))[0]


def s32(x: int) -> int:
    return x % 2**32


NAN, INF, TINY = float("nan"), float("inf"), 2.0**-140
MOST, LEAST = 2**31 - 1, -(2**31)

# Instruction on %r1, %r2, %r3, to %r5; operands; result: as the PTX ISA has it.
INSTRUCTIONS = [
    ("div.s32 %r5, %r1, %r2;", (s32(-7), 2), s32(-3)),
    ("div.s32 %r5, %r1, %r2;", (7, s32(-2)), s32(-3)),
    ("div.s32 %r5, %r1, %r2;", (s32(-8), s32(-2)), 4),
    ("div.u32 %r5, %r1, %r2;", (s32(-7), 2), (2**32 - 7) // 2),
    ("rem.s32 %r5, %r1, %r2;", (s32(-7), 3), s32(-1)),
    ("rem.s32 %r5, %r1, %r2;", (7, s32(-3)), 1),
    ("add.s32 %r5, %r1, -1;", (0,), s32(-1)),
    ("sub.s32 %r5, %r1, %r2;", (s32(LEAST), 1), MOST),
    ("mul.lo.s32 %r5, %r1, %r2;", (123456789, s32(-987)), s32(-123456789 * 987)),
    ("mul.hi.s32 %r5, %r1, %r2;", (s32(LEAST), 3), s32((LEAST * 3) >> 32)),
    ("mul.hi.u32 %r5, %r1, %r2;", (2**32 - 1, 2**32 - 1), (2**32 - 1) ** 2 >> 32),
    ("mad.lo.s32 %r5, %r1, %r2, %r3;", (s32(-3), 5, 100), 85),
    ("mul.wide.s32 %rd4, %r1, %r2; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r5, %rd4;", (s32(-2), 3), s32(-1)),
    ("mul.wide.u32 %rd4, %r1, %r2; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r5, %rd4;", (2**32 - 2, 3), 2),
    ("mad.lo.cc.u32 %r9, %r1, %r2, %r3; madc.hi.u32 %r5, %r1, %r2, 0;", (2**31, 3, 2**31), ((2**31 * 3) + 2**31) >> 32),
    ("shl.b32 %r5, %r1, %r2;", (1, 31), 2**31),
    ("shl.b32 %r5, %r1, %r2;", (1, 32), 0),
    ("shr.u32 %r5, %r1, %r2;", (2**32 - 1, 40), 0),
    ("shr.s32 %r5, %r1, %r2;", (s32(-5), 40), s32(-1)),
    ("shr.s32 %r5, %r1, 1;", (s32(-5),), s32(-3)),
    ("shf.l.wrap.b32 %r5, %r1, %r2, %r3;", (0x89ABCDEF, 0x01234567, 36), 0x12345678),
    ("shf.r.wrap.b32 %r5, %r1, %r2, 8;", (0x89ABCDEF, 0x01234567), 0x6789ABCD),
    ("bfe.u32 %r5, %r1, 4, 8;", (0x12345678,), 0x67),
    ("bfe.s32 %r5, %r1, 4, 4;", (0x000000F0,), s32(-1)),
    ("popc.b32 %r5, %r1;", (0xF00F0001,), 9),
    ("prmt.b32 %r5, %r1, %r2, 0x6240U;", (0x33221100, 0x77665544), 0x66224400),
    ("prmt.b32 %r5, %r1, 0, 0x7772U;", (0x33221100,), 0x22),
    ("prmt.b32 %r5, %r1, 0, 0x9988U;", (0x0000FF11,), 0xFFFF0000),
    ("min.s32 %r5, %r1, %r2;", (s32(-1), 1), s32(-1)),
    ("max.u32 %r5, %r1, %r2;", (s32(-1), 1), s32(-1)),
    ("max.relu.s32 %r5, %r1, %r2;", (s32(-9), s32(-2)), 0),
    ("neg.s32 %r5, %r1;", (5,), s32(-5)),
    ("not.b32 %r5, %r1;", (0xF0F0F0F0,), 0x0F0F0F0F),
    # 1 - 2^-46 is lost where the product is rounded before the sum.
    ("fma.rn.f32 %r5, %r1, %r2, %r3;", (f32(1 + 2**-23), f32(1 - 2**-23), f32(-1.0)), f32(-(2.0**-46))),
    ("add.f32 %r5, %r1, %r2;", (f32(1.0), f32(2.0**-24)), f32(1.0)),
    ("add.f32 %r5, %r1, 0f3F800000;", (f32(2.5),), f32(3.5)),
    ("add.f32 %r5, %r1, %r2;", (f32(TINY), f32(TINY)), f32(2 * TINY)),
    ("mul.rn.ftz.f32 %r5, %r1, %r2;", (f32(TINY), f32(1.0)), f32(0.0)),
    ("fma.rn.ftz.f32 %r5, %r1, %r2, %r3;", (f32(2.0**-70), f32(-(2.0**-70)), f32(0.0)), f32(-0.0)),
    ("max.f32 %r5, %r1, %r2;", (f32(NAN), f32(-3.0)), f32(-3.0)),
    ("min.f32 %r5, %r1, %r2;", (f32(-3.0), f32(NAN)), f32(-3.0)),
    ("neg.f32 %r5, %r1;", (f32(0.0),), f32(-0.0)),
    ("abs.f32 %r5, %r1;", (f32(-INF),), f32(INF)),
    ("div.rn.f32 %r5, %r1, %r2;", (f32(1.0), f32(-0.0)), f32(-INF)),
    ("div.full.f32 %r5, %r1, %r2;", (f32(3.0), f32(0.0)), f32(INF)),
    ("div.full.f32 %r5, %r1, %r2;", (f32(3.4e38), f32(1.0)), f32(3.4e38)),
    ("div.full.f32 %r5, %r1, %r2;", (f32(2.0**127), f32(2.0**126)), f32(2.0)),
    ("sqrt.rn.f32 %r5, %r1;", (f32(2.0),), f32(math.sqrt(2))),
    ("ex2.approx.ftz.f32 %r5, %r1;", (f32(-3.0),), f32(0.125)),
    ("ex2.approx.ftz.f32 %r5, %r1;", (f32(-130.0),), f32(0.0)),
    ("ex2.approx.f32 %r5, %r1;", (f32(-130.0),), f32(2.0**-130)),
    ("ex2.approx.ftz.f32 %r5, %r1;", (f32(-INF),), f32(0.0)),
    ("cvt.rzi.s32.f32 %r5, %r1;", (f32(-1.9),), s32(-1)),
    ("cvt.rzi.s32.f32 %r5, %r1;", (f32(3e9),), MOST),
    ("cvt.rzi.s32.f32 %r5, %r1;", (f32(-3e9),), s32(LEAST)),
    ("cvt.rzi.s32.f32 %r5, %r1;", (f32(NAN),), 0),
    ("cvt.rni.s32.f32 %r5, %r1;", (f32(2.5),), 2),
    ("cvt.rpi.f32.f32 %r5, %r1;", (f32(2.1),), f32(3.0)),
    ("cvt.rn.f32.s32 %r5, %r1;", (s32(-3),), f32(-3.0)),
    ("cvt.rn.f32.u32 %r5, %r1;", (2**32 - 1,), f32(2.0**32)),
    ("cvt.s64.s32 %rd4, %r1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r5, %rd4;", (s32(-1),), s32(-1)),
    ("cvt.rzi.s64.f32 %rd4, %r1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r5, %rd4;", (f32(1e30),), MOST),
    ("cvt.rn.f16x2.f32 %r5, %r1, %r2;", (f32(2.0), f32(1 + 2**-11)), f16(2.0) << 16 | f16(1.0)),
    ("cvt.rn.f16x2.f32 %r5, %r1, %r2;", (f32(70000.0), f32(-(2.0**-25))), f16(INF) << 16 | f16(-0.0)),
    ("cvt.rn.bf16x2.f32 %r5, %r1, %r2;", (0x3F818000, 0x3F808000), 0x3F823F80),
    ("cvt.rn.f16.f32 %rs0, %r1; cvt.f32.f16 %r5, %rs0;", (f32(0.1),), f32(float(np.float16(0.1)))),
    ("cvt.rn.bf16.f32 %rs0, %r1; cvt.f32.bf16 %r5, %rs0;", (f32(NAN),), 0x7FFF0000),
    ("add.f16x2 %r5, %r1, %r2;", (f16(1.5) << 16 | f16(2.0), f16(1.0) << 16 | f16(-5.0)), f16(2.5) << 16 | f16(-3.0)),
    ("add.bf16x2 %r5, %r1, %r2;", (0x3F804000, 0x3F804000), 0x40004080),
    ("fma.rn.bf16x2 %r5, %r1, %r2, %r3;", (0x40404000, 0x3F804000, 0x3F803F80), 0x408040A0),
    ("mov.b32 {%rs0, %rs1}, %r1; mov.b32 %r5, {%rs1, %rs0};", (0x12345678,), 0x56781234),
    ("mov.b64 %rd4, {%r1, %r2}; mov.b64 {%r9, %r5}, %rd4;", (1, 2), 2),
    ("setp.lt.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (f32(NAN), f32(1.0)), 2),
    ("setp.ltu.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (f32(NAN), f32(1.0)), 1),
    ("setp.ne.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (f32(NAN), f32(1.0)), 2),
    ("setp.neu.f32 %p1, %r1, %r2; selp.b32 %r5, 1, 2, %p1;", (f32(NAN), f32(1.0)), 1),
    ("setp.nan.f32 %p1, %r1, %r1; selp.f32 %r5, 0f3F800000, 0f00000000, %p1;", (f32(NAN),), f32(1.0)),
    ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r5, 1, 2, %p1;", (s32(-1),), 1),
    ("setp.lt.u32 %p1, %r1, 1; selp.b32 %r5, 1, 2, %p1;", (s32(-1),), 2),
    (
        "setp.nan.f16x2 %p1|%p2, %r1, %r1; selp.b32 %r9, 1, 0, %p1; @%p2 add.s32 %r9, %r9, 2; mov.b32 %r5, %r9;",
        (f16(NAN) << 16 | f16(1.0),),
        2,
    ),
    ("setp.eq.b32 %p1, %r1, 3; @!%p1 mov.b32 %r5, 9;", (4,), 9),
    ("setp.eq.b32 %p1, %r1, 3; @!%p1 mov.b32 %r5, 9;", (3,), 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "operands", "wanted"), INSTRUCTIONS, ids=[f"{i}" for i in range(len(INSTRUCTIONS))])
def test_instructions(text, operands, wanted):
    given = np.array([[*operands, *[0] * (4 - len(operands))]] * 32, np.uint32)
    assert [hex(each) for each in run(text, given)[:, 0]] == [hex(wanted)] * 32


def lanes():
    return np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("shfl.sync.bfly.b32 %r5, %r90, 5, 31, -1;", lanes() ^ 5),
        (
            "shfl.sync.up.b32 %r5, %r90, 3, 0, -1;",
            np.maximum(np.arange(32) - 3, np.arange(32) % 3 * (np.arange(32) < 3)),
        ),
        ("shfl.sync.idx.b32 %r5, %r90, 7, 31, -1;", np.full(32, 7)),
        ("shfl.sync.down.b32 %r5, %r90, 2, 31, -1;", np.where(lanes() < 30, lanes() + 2, lanes())),
        # In parts of 8 lanes: the upper three bits of a lane's number stay.
        ("shfl.sync.down.b32 %r5, %r90, 2, 6175, -1;", np.where(lanes() % 8 < 6, lanes() + 2, lanes())),
        ("shfl.sync.idx.b32 %r5, %r90, 9, 6175, -1;", lanes() // 8 * 8 + 1),
        ("shfl.sync.up.b32 %r9|%p1, %r90, 3, 0, -1; selp.b32 %r5, 1, 0, %p1;", lanes() >= 3),
        ("redux.sync.add.s32 %r5, %r90, -1;", np.full(32, 31 * 16)),
        ("redux.sync.min.s32 %r5, %r90, 240;", np.full(32, 4)),
        ("elect.sync %r5|%p1, -1; selp.b32 %r5, 1, 0, %p1;", lanes() == 0),
        ("mov.u32 %r5, %laneid;", lanes()),
    ],
    ids=[
        "bfly",
        "up",
        "idx",
        "down",
        "down in parts",
        "idx in parts",
        "up, who",
        "redux",
        "redux of some",
        "elect",
        "laneid",
    ],
)
def test_lanes(text, wanted):
    assert run(text, blocks=2)[:, 0].tolist() == wanted.tolist() * 2


LOOP = """
	mov.b32 %r20, 0;
	bra.uni $L_2;
$L_6:
	add.s32 %r20, %r20, 1;
	setp.lt.s32 %p3, %r20, 3;
	@%p3 bra $L_2;
	bra.uni $L_7;
$L_2:
	shfl.sync.bfly.b32 %r21, %r90, 1, 31, -1;
	add.s32 %r5, %r5, %r21;
	and.b32 %r22, %r90, 1;
	setp.eq.b32 %p1, %r22, 0;
	@%p1 bra $L_6;
	add.s32 %r6, %r6, 1;
	bra.uni $L_6;
$L_7:
"""


def test_threads_that_branch_apart_in_a_loop_meet_before_its_next_round():
    """Where they meet stands in front of where they part, as compilers lay loops out."""
    result = run(LOOP)
    assert result[:, 0].tolist() == (3 * (lanes() ^ 1)).tolist()
    assert result[:, 1].tolist() == (3 * (lanes() % 2)).tolist()


def test_threads_go_round_a_loop_as_often_as_each_asks():
    body = (
        "$L_1: add.s32 %r5, %r5, 2; setp.lt.u32 %p1, %r5, %r90; @%p1 bra $L_1; shfl.sync.idx.b32 %r6, %r5, 9, 31, -1;"
    )
    result = run(body)
    assert result[:, 0].tolist() == [max(2, i + i % 2) for i in range(32)]
    assert result[:, 1].tolist() == [10] * 32


def test_what_follows_a_loop_comes_behind_it():
    #      0 -> 1 -> 2 -> 3 (back to 1, on to 4), and 1 -> 4
    found = ranks([[1], [4, 2], [3], [1, 4], []])
    assert found[4] > found[3] > found[2] > found[1] > found[0]


MIRROR = """
	mov.b32 %r10, global_smem;
	shl.b32 %r11, %r90, 2;
	add.s32 %r12, %r10, %r11;
	st.shared.b32 [%r12], %r90;
	bar.sync 0;
	sub.s32 %r13, 63, %r90;
	shl.b32 %r13, %r13, 2;
	add.s32 %r14, %r10, %r13;
	ld.shared.b32 %r5, [%r14];
"""


def test_blocks_have_shared_memory_of_their_own():
    assert run(MIRROR, threads=64, blocks=3, shared=256)[:, 0].tolist() == [*range(63, -1, -1)] * 3


def test_shared_memory_is_poison_at_first_and_ends_where_it_does():
    assert run("ld.shared.b32 %r5, [global_smem];", shared=4)[0, 0] == 2**32 - 1
    with pytest.raises(MemoryFault, match=r"_|kernel, :7: .* outside of 252 \(ld.shared.b32, line \d+ of the PTX\)"):
        run("ld.shared.b32 %r5, [global_smem+252];", shared=252)


def test_atomic_operations_are_one_after_the_other():
    result = run("atom.global.gpu.acq_rel.add.u32 %r9, [%rd1], 1; st.global.b32 [%rd3+4], %r9;", bare=True, blocks=3)
    assert result[0, 0] == 96
    assert sorted(result[:, 1]) == list(range(96))
    assert run("atom.global.gpu.relaxed.cas.b32 %r9, [%rd1], %r90, 5;", bare=True)[0, 0] == 5
    assert run("atom.global.gpu.relaxed.max.s32 %r9, [%rd1], -1;", bare=True)[0, 0] == 0


def test_copies_are_poison_until_they_are_waited_for():
    place = "mov.b32 %r10, global_smem; mad.lo.s32 %r10, %r90, 16, %r10;"
    copy = f"{place} cp.async.cg.shared.global [%r10], [%rd2], 0x10, %r2;"
    given = np.tile(np.array([[7, 16, 0, 0], [8, 0, 0, 0]], np.uint32), (16, 1))
    read = "ld.shared.b32 %r5, [%r10];"
    early = run(f"{copy} cp.async.commit_group; {read}", given, shared=512)
    late = run(f"{copy} cp.async.commit_group; cp.async.wait_group 0; {read}", given, shared=512)
    assert early[:, 0].tolist() == [2**32 - 1] * 32
    assert late[:, 0].tolist() == [7, 0] * 16


FIRST = "setp.eq.b32 %p1, %r90, 0;"


@pytest.mark.parametrize(
    ("text", "fault", "message"),
    [
        ("ld.global.v2.b32 {%r5, %r6}, [%rd2+4];", MemoryFault, "a load of 8 bytes at 0x.*, not aligned to them"),
        ("st.global.b32 [%rd3+512], %r5;", MemoryFault, "a store of 4 bytes at 0x.*, which is in none"),
        ("ld.global.b32 %r5, [%rd2+-16];", MemoryFault, "a load of 4 bytes at 0x.*, which is in none"),
        ("mov.b64 %rd4, 0; ld.global.b32 %r5, [%rd4];", MemoryFault, "a load of 4 bytes at 0x0,"),
        ("st.global.b32 [%rd1], %r90;", Race, "two threads write different values at once"),
        ("st.global.b32 [%rd3], %r90; ld.global.b32 %r5, [%rd1+16];", Race, "another thread has written"),
        ("ld.global.b32 %r9, [%rd1]; st.global.b32 [%rd3], 1;", Race, "another .* has read"),
        ("st.global.b32 [%rd3], %r93; bar.sync 0; ld.global.b32 %r9, [%rd1+16];", Race, "another block has written"),
        (f"{FIRST} @%p1 bra $L_9; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; $L_9:", RuntimeError, "in a part of one"),
        (f"{FIRST} @%p1 bra $L_9; bar.sync 0; $L_9:", RuntimeError, "at a barrier that others never reach"),
        ("$L_1: bra.uni $L_1;", RuntimeError, "something that never comes"),
        ("vabsdiff.u32 %r5, %r1, %r2;", Unsupported, r"kernel, line \d+ of the PTX: vabsdiff.u32 %r5, %r1, %r2"),
        ("mul.rz.f32 %r5, %r1, %r2;", Unsupported, "mul.rz.f32"),
        ("atom.global.gpu.relaxed.inc.u32 %r9, [%rd1], 1;", Unsupported, r"kernel, :7: atom.inc \(atom"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, fault, message, monkeypatch):
    monkeypatch.setattr(machine, "_ENDLESS", 100)
    with pytest.raises(fault, match=message):
        run(text, bare="global" in text, threads=64, blocks=2)


@pytest.mark.parametrize(
    "text",
    [
        "st.global.b32 [%rd3], %r90; bar.sync 0; ld.global.b32 %r9, [%rd1+16];",
        "ld.global.b32 %r9, [%rd1]; bar.sync 0; st.global.b32 [%rd3], 1;",
        "ld.global.b32 %r9, [%rd1]; bar.sync 0; ld.global.b32 %r9, [%rd3]; st.global.b32 [%rd3], 1;",
        "st.global.b32 [%rd1], 5;",
    ],
    ids=["a barrier before the load", "a barrier before the store", "read again by its writer", "the same value"],
)
def test_what_is_no_race_is_let_through(text):
    run(text, bare=True, threads=64)


@triton.jit
def _mirrored(x_ptr, y_ptr, z_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(z_ptr + at, tl.load(y_ptr + (N - 1 - at)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kernel_of_ones_own(capability):
    x, y, z = torch.arange(512.0), torch.zeros(512), torch.zeros(512)
    with emulated(capability) as driver:
        assert gpu() == (capability, CHIPS[capability].multiprocessors)
        _mirrored[(1,)](x, y, z, N=512, BARRIER=True)
        assert torch.equal(z, x.flip(0))
        with pytest.raises(Race, match=r"^_mirrored, test_emulator.py:\d+: another thread has written"):
            _mirrored[(1,)](x, y, z, N=512, BARRIER=False)
        with pytest.raises(MemoryFault, match=r"_mirrored, test_emulator.py:\d+: a load of"):
            _mirrored[(1,)](x[:256].clone(), y, z, N=512, BARRIER=True)
    assert driver.ran == {"_mirrored": 1}


def test_emulations_end_and_refuse():
    for other in (100, 7, "90"):  # the first is one that can be compiled for
        with pytest.raises(ValueError, match=f"capability must be one of 80, 89, 90, got {other!r}"), emulated(other):
            pass
    with emulated(90, multiprocessors=3):
        assert gpu() == (90, 3)
        with emulated(80):
            assert gpu().capability == 80
        assert gpu() == (90, 3)
