"""Tiles by op, shape and GPU. Every row says where it comes from; nothing is tuned at run time."""

import functools
from typing import NamedTuple

import triton


class NormTile(NamedTuple):
    BLOCK_M: int  # rows at a time
    BLOCK_N: int  # columns of a piece
    num_warps: int
    per_multiprocessor: int = 0  # programs of the backward pass
    whole: bool = True  # rows are in registers, in pieces; otherwise a loop goes through the pieces


# Columns up to -> rows, warps (and programs per multiprocessor: of 16-bit rows, of float32). 768 columns and more keep
# about as many values in a thread; chosen from the compile report (no spills on sm_80 to sm_100, and no more programs
# than find room on an H100 together), not yet measured.
_NORM_FORWARD = {128: (16, 4), 256: (8, 4), 2048: (4, 4), 4096: (1, 8), 16384: (1, 16)}
_NORM_BACKWARD = {
    128: (16, 4, 3, 3),
    256: (8, 4, 3, 3),
    512: (4, 4, 3, 3),
    768: (4, 4, 2, 2),
    1024: (2, 4, 3, 3),
    2048: (1, 4, 3, 2),
    4096: (1, 8, 2, 1),
    8192: (1, 16, 1, 1),
}
# What a warp loads at a time. In pieces of so many bytes, to 2048 and 768 columns, each of 4 warps has rows of its own,
# and adds up without the others: half the instructions of rows that warps share, which came to 2.55 and 1.68 TB/s at
# 768 columns in probes on an H100, 2026-11-22. Chosen from the compile report, not yet measured.
_PIECE = 512


@functools.cache
def norm_forward_tile(columns: int, itemsize: int) -> NormTile:
    return _norm_tile(_NORM_FORWARD, columns, itemsize, 2048)


@functools.cache
def norm_backward_tile(columns: int, itemsize: int) -> NormTile:
    return _norm_tile(_NORM_BACKWARD, columns, itemsize, 768)


def _norm_tile(table: dict, columns: int, itemsize: int, in_pieces: int) -> NormTile:
    """in_pieces: columns up to which a warp has rows of its own."""
    for most, (rows, warps, *programs) in table.items():
        if columns <= most:
            per_multiprocessor = programs[itemsize == 4] if programs else 0
            block = max(16, triton.next_power_of_2(columns))
            if columns <= in_pieces:
                block = min(block, _PIECE // itemsize)
            return NormTile(rows, block, warps, per_multiprocessor)
    # Wider than registers: a loop over pieces of 4096.
    return NormTile(1, 4096, 8, 2, whole=False)


class AttentionTile(NamedTuple):
    BLOCK_M: int  # queries at a time
    BLOCK_N: int  # keys at a time
    BLOCK_D: int  # the head width, padded
    num_warps: int
    num_stages: int


# By head width up to, for 16-bit inputs: (queries, keys, warps, stages). With tensor descriptors, 64 wide:
# a probe on an H100, 2026-11-22, 393 TFLOP/s at B4 H12 T4096. The others: chosen from the compile report
# (no spills on sm_80 to sm_100), not yet measured.
_ATTENTION_FORWARD_TMA = {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2)}
_ATTENTION_FORWARD = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)}
# With 99 KiB for a block: two of them on a multiprocessor. Chosen from the compile report, not yet measured.
_ATTENTION_FORWARD_SMALL = _ATTENTION_FORWARD | {128: (64, 32, 4, 2)}
# float32 multiplies on the CUDA cores: small tiles, whose accumulators fit the registers.
_ATTENTION_FORWARD_FLOAT32 = {64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (16, 32, 4, 1)}


@functools.cache
def attention_forward_tile(width: int, element_size: int, *, tma: bool, small: bool) -> AttentionTile:
    """small: the GPU's blocks have 99 KiB of shared memory."""
    half = _ATTENTION_FORWARD_TMA if tma else _ATTENTION_FORWARD_SMALL if small else _ATTENTION_FORWARD
    return _attention_tile(half if element_size == 2 else _ATTENTION_FORWARD_FLOAT32, width)


# The two kernels of the backward pass: (queries, keys, warps, stages) of dk and dv, then of dq. 64 wide with
# descriptors: a probe on an H100, 2026-11-22, level with cuDNN at T = 1024 and 4096. The others: chosen from
# the compile report, not yet measured.
_ATTENTION_BACKWARD_TMA = {64: ((64, 64, 4, 3), (64, 64, 4, 3)), 128: ((32, 64, 8, 2), (64, 64, 8, 2))}
_ATTENTION_BACKWARD = {
    64: ((32, 64, 4, 2), (64, 32, 4, 3)),
    128: ((64, 64, 8, 2), (64, 64, 8, 2)),
    256: ((32, 32, 8, 1), (32, 32, 8, 1)),
}
_ATTENTION_BACKWARD_FLOAT32 = {
    64: ((16, 32, 4, 1), (32, 32, 4, 1)),
    128: ((16, 32, 4, 1), (16, 16, 4, 1)),
    256: ((16, 16, 4, 1), (16, 16, 4, 1)),
}


@functools.cache
def attention_backward_tiles(width: int, element_size: int, *, tma: bool) -> tuple[AttentionTile, AttentionTile]:
    half = _ATTENTION_BACKWARD_TMA if tma else _ATTENTION_BACKWARD
    table = half if element_size == 2 else _ATTENTION_BACKWARD_FLOAT32
    keys, queries = ({most: row[i] for most, row in table.items()} for i in (0, 1))
    return _attention_tile(keys, width), _attention_tile(queries, width)


def _attention_tile(table: dict, width: int) -> AttentionTile:
    block_d = max(16, triton.next_power_of_2(width))
    queries, keys, warps, stages = next(row for most, row in table.items() if block_d <= most)
    return AttentionTile(queries, keys, block_d, warps, stages)


class PointwiseTile(NamedTuple):
    BLOCK_M: int  # rows
    BLOCK_N: int  # columns
    num_warps: int


@functools.cache
def pointwise_tile(columns: int) -> PointwiseTile:
    # 16 elements a thread: two 16-byte accesses of 16-bit values to each array. Chosen from the compile
    # report, not yet measured.
    across = min(2048, max(16, triton.next_power_of_2(columns)))
    return PointwiseTile(2048 // across, across, 4)


class RopeTile(NamedTuple):
    BLOCK_H: int  # heads
    num_warps: int


@functools.cache
def rope_tile(heads: int, width: int) -> RopeTile:
    # 16 pairs a thread, which are those of two heads: each sine and cosine that a thread makes is used
    # twice. Chosen from the compile report, not yet measured.
    width = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(heads), 4096 // width))
    return RopeTile(block, max(1, min(4, block * width // 1024)))


class EmbeddingTile(NamedTuple):
    BLOCK_M: int  # rows of the upstream gradient at a time
    BLOCK_C: int  # columns
    num_warps: int


@functools.cache
def embedding_tile(columns: int) -> EmbeddingTile:
    # 8 columns a thread, 16 bytes of 16-bit values. Chosen from the compile report, not yet measured.
    block = min(1024, max(16, triton.next_power_of_2(columns)))
    return EmbeddingTile(4, block, max(1, block // 256))
