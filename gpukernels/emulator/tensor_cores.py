"""Products of matrices that a warp, or four, hold between them, and the moves of their tiles.

How elements lie in the threads' registers: PTX ISA 8.7, "Matrix multiply-accumulate" and "Asynchronous warpgroup".
"""

import numpy as np

from gpukernels.emulator import values
from gpukernels.emulator.faults import Unsupported


def truncated(x: np.ndarray) -> np.ndarray:
    """float64 cut off to float32, as tensor cores add: towards zero."""
    near = x.astype(np.float32)
    too_far = np.abs(near.astype(np.float64)) > np.abs(x)
    return np.where(too_far & np.isfinite(x), np.nextafter(near, np.float32(0)), near)


def pairs(word: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The two elements of a register, as float64."""
    low, high = values.halves(word)
    if kind == "bf16":
        return np.float64(values.from_bf16(low)), np.float64(values.from_bf16(high))
    return np.float64(low.view(np.float16)), np.float64(high.view(np.float16))


_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _rows_of(words, kind: str, warps: int) -> np.ndarray:
    """A (warps, 16, 16) from its registers."""
    a = np.empty((warps, 16, 8 * (len(words) // 2)))
    for i, word in enumerate(words):
        row, column = _GROUP + 8 * (i % 2), 2 * _IN_GROUP + 8 * (i // 2)
        low, high = pairs(word, kind)
        a[:, row, column], a[:, row, column + 1] = low.reshape(warps, 32), high.reshape(warps, 32)
    return a


def mma(machine, mask, a_words, b_words, c_words, kind):
    """`mma.sync.m16n8k{8, 16}`: the words of d, float32."""
    machine.lanes(machine.block, mask)
    warps = machine.count // 32
    a = _rows_of(a_words, kind, warps)
    b = np.empty((warps, a.shape[2], 8))
    for i, word in enumerate(b_words):
        low, high = pairs(word, kind)
        row = 2 * _IN_GROUP + 8 * i
        b[:, row, _GROUP], b[:, row + 1, _GROUP] = low.reshape(warps, 32), high.reshape(warps, 32)
    c = np.empty((warps, 16, 8))
    for i, word in enumerate(c_words):
        c[:, _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2] = word.view(np.float32).reshape(warps, 32)
    # sm_80 adds eight products at a time.
    for k in range(0, a.shape[2], 8):
        c = np.float64(truncated(a[:, :, k : k + 8] @ b[:, k : k + 8] + c))
    d = c.astype(np.float32)
    return [d[:, _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2].reshape(-1) for i in range(4)]


def ldmatrix(machine, mask, addresses, count, transposed):
    """`count` matrices of 8 x 8 16-bit elements; lane 8 i + r has the address of row r of matrix i."""
    lanes = machine.lanes(addresses, mask)
    warps = len(lanes)
    active = np.ones(warps, bool) if mask is None else mask.reshape(-1, 32)[:, 0]
    found = np.zeros((count, warps, 32), np.uint32)
    block = machine.block.reshape(-1, 32)[:, :1]
    for i in range(count):
        rows = lanes[active, 8 * i : 8 * i + 8].reshape(-1)
        who = np.repeat(block[active], 8, axis=1).reshape(-1)
        matrix = machine.shared.load(who, rows, 2, 8).reshape(-1, 8, 8)
        if transposed:
            matrix = matrix.transpose(0, 2, 1)
        low, high = matrix[:, _GROUP, 2 * _IN_GROUP], matrix[:, _GROUP, 2 * _IN_GROUP + 1]
        found[i, active] = values.joined(low, high)
    return found.reshape(count, -1)


def stmatrix(machine, mask, addresses, words, transposed):
    """The inverse of `ldmatrix`."""
    lanes = machine.lanes(addresses, mask)
    active = np.ones(len(lanes), bool) if mask is None else mask.reshape(-1, 32)[:, 0]
    block = machine.block.reshape(-1, 32)[:, :1]
    for i, word in enumerate(words):
        low, high = values.halves(word.reshape(-1, 32)[active])
        matrix = np.empty((len(low), 8, 8), np.uint16)
        matrix[:, _GROUP, 2 * _IN_GROUP], matrix[:, _GROUP, 2 * _IN_GROUP + 1] = low, high
        if transposed:
            matrix = matrix.transpose(0, 2, 1)
        rows = lanes[active, 8 * i : 8 * i + 8].reshape(-1)
        who = np.repeat(block[active], 8, axis=1).reshape(-1)
        machine.shared.store(who, rows, matrix.reshape(-1, 8))


# Four warps: operands in shared memory are described by 64 bits ("Matrix-descriptor"): start, leading and stride
# byte offsets in units of 16 bytes, and how 16-byte pieces are exchanged.

_ROW_BYTES = {1: 128, 2: 64, 3: 32}


def swizzled(address: np.ndarray, row_bytes: int) -> np.ndarray:
    """Where a byte lies: its 16-byte piece is exchanged by the number of its row of 128 bytes."""
    return address ^ (((address >> 7) & (row_bytes // 16 - 1)) << 4)


def _operand(machine, block: int, descriptor: int, wide: int, deep: int, transposed: bool) -> np.ndarray:
    """(wide, deep) elements of 16 bits; `transposed`: neighbours lie along `wide`, not along `deep`."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    mode = descriptor >> 62
    if mode not in _ROW_BYTES or (descriptor >> 49) & 7:
        raise Unsupported(f"a wgmma descriptor with swizzle mode {mode}")
    row_bytes = _ROW_BYTES[mode]
    n, k = np.arange(wide)[:, None], np.arange(deep)[None, :]
    if transposed:
        each = row_bytes // 2
        at = n // each * leading + k // 8 * stride + k % 8 * row_bytes + n % each * 2
    else:
        if 2 * deep > row_bytes:
            raise Unsupported("a wgmma operand deeper than its rows")
        at = n // 8 * stride + n % 8 * row_bytes + k * 2
    at = swizzled(start + at, row_bytes)
    flat = machine.shared.load(np.full(at.size, block), at.reshape(-1), 2, 1)
    return flat.reshape(at.shape)


def wgmma(machine, mask, given, a, b, keep, columns, kind, scale_a, scale_b, *transposed):
    """`wgmma.mma_async.m64nNk16`: the words of d. Run at once; a GPU may take until the next wait."""
    if scale_a != 1 or scale_b != 1:
        raise Unsupported("wgmma with a negative operand")
    if mask is not None and (mask.reshape(-1, 128).any(1) != mask.reshape(-1, 128).all(1)).any():
        raise RuntimeError("wgmma runs in a part of its four warps")
    groups = machine.count // 128
    active = range(groups) if mask is None else np.flatnonzero(mask.reshape(-1, 128)[:, 0])
    result = np.stack(given).view(np.float32).reshape(len(given), groups, 4, 32)
    index = np.arange(len(given))
    # Accumulator i of a lane of warp w is in row 16 w + lane // 4 + 8 (i // 2 % 2),
    # column 8 (i // 4) + 2 (lane % 4) + i % 2.
    row = 16 * np.arange(4)[None, :, None] + _GROUP[None, None, :] + 8 * (index // 2 % 2)[:, None, None]
    column = np.broadcast_to((8 * (index // 4) + index % 2)[:, None, None] + 2 * _IN_GROUP[None, None, :], row.shape)
    float_of = (
        (lambda x: np.float64(values.from_bf16(x))) if kind == "bf16" else (lambda x: np.float64(x.view(np.float16)))
    )
    for group in active:
        lane = 128 * group
        block = int(machine.block[lane])
        if isinstance(a, list):
            words = [word[lane : lane + 128] for word in a]
            left = _rows_of(words, kind, 4).reshape(64, 16)
        else:
            left = float_of(_operand(machine, block, int(a[lane]), 64, 16, bool(transposed[0])))
        right = float_of(_operand(machine, block, int(b[lane]), columns, 16, bool(transposed[-1])))
        d = left @ right.T
        if keep[lane]:
            c = np.empty((64, columns))
            c[row, column] = result[:, group]
            d = d + c
        result[:, group] = truncated(d)[row, column]
    return result.reshape(len(given), -1)
