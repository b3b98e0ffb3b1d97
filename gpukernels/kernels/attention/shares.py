"""The parts of split-key decoding, whatever the heads are: see `decode.py`."""

import triton
import triton.language as tl


@triton.jit
def share_of(lengths_ptr, row, S, window, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row's keys in use, how many programs share them, and the keys of this one: from, to."""
    length = tl.minimum(tl.load(lengths_ptr + row, cache_modifier=".cg").to(tl.int32), S)
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    used = tl.maximum(tl.cdiv(length - first, tl.maximum(share, 1)), 1)  # the first one writes zeros if need be
    start = first + split * share
    return length, used, start, tl.minimum(start + share, length)


@triton.jit
def load_block(
    ptr, start, stop, stride, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """Keys or values `start` to `start + BLOCK_N`: (BLOCK_N, BLOCK_D), 0 from `stop` on. WHOLE: all are there.

    .cg: from the L2 cache, where whatever an earlier kernel wrote is, even before this one has waited.
    """
    key, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    pointers = ptr + key[:, None].to(tl.int64) * stride + d[None, :]
    if WHOLE and D == BLOCK_D:
        block = tl.load(pointers, cache_modifier=".cg")
    elif WHOLE:
        block = tl.load(pointers, (d < D)[None, :], other=0.0, cache_modifier=".cg")
    else:
        # What lies past a row's length may be anything, and 0 * inf is NaN.
        block = tl.load(pointers, (key < stop)[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg")
    return block


@triton.jit
def rescale(peak, new_peak):
    """What a sum with the maximum `peak` is multiplied by, and the base of new weights."""
    # Where nothing has been seen, -inf must not be subtracted from -inf.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return tl.exp2(peak - base), base


@triton.jit
def take_new(
    q, new_k_ptr, new_v_ptr, k_ptr, v_ptr, peak, total, acc,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The newest key and value: on top of peak and total (G,), acc (G, BLOCK_D) of q (G, BLOCK_D), and to the cache."""
    d = tl.arange(0, BLOCK_D)
    k, v = tl.load(new_k_ptr + d, d < D, other=0.0), tl.load(new_v_ptr + d, d < D, other=0.0)
    tl.store(k_ptr + d, k, d < D)
    tl.store(v_ptr + d, v, d < D)
    t = tl.sum(q * k.to(tl.float32)[None, :], 1)
    new_peak = tl.maximum(peak, t)
    old, base = rescale(peak, new_peak)
    weight = tl.exp2(t - base)
    return new_peak, total * old + weight, acc * old[:, None] + weight[:, None] * v.to(tl.float32)[None, :]


@triton.jit
def combine(acc_ptr, stats_ptr, out_ptr, used, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    """One head: the partials of `used` programs, in the order of the shares, to its output."""
    # Other programs wrote them: .cg looks for them in the L2 cache.
    split = tl.arange(0, BLOCK_P)
    peak = tl.load(stats_ptr + 2 * split, split < used, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats_ptr + 2 * split + 1, split < used, other=0.0, cache_modifier=".cg")
    weight, _base = rescale(peak, tl.max(peak, 0))
    total = tl.sum(weight * total, 0)
    PART: tl.constexpr = min(64, BLOCK_D)
    for start in tl.static_range(0, BLOCK_D, PART):
        d = start + tl.arange(0, PART)
        mask = (split < used)[:, None] & (d < D)[None, :]
        acc = tl.load(acc_ptr + split[:, None] * D + d[None, :], mask, other=0.0, cache_modifier=".cg")
        out = tl.sum(weight[:, None] * acc, 0) / total
        tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), d < D)


@triton.jit
def arrives_last(counter_ptr, used):
    """Whether this is the last of the `used` programs to come here; what they have stored is visible then."""
    tl.debug_barrier()  # all of this program's stores come before the count
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = arrived == used - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
