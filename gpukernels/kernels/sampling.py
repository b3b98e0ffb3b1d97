"""From logits to tokens in one kernel, by searching thresholds: no sort, no random order of sums.

`gpukernels.numpy_ops.sampling` defines a token's weight as a whole number below 2^41, and the choice as
sums and comparisons of weights. This kernel computes the same whole numbers, so it makes the same choice.

One program takes one row and passes over it, from memory once and from the L2 cache afterwards:

    the largest logit and its lowest id                       1 pass; temperature 0 ends here
    top-k: the least distance from it with k tokens within    a search
    the sum of weights                                        1 pass
    top-p: the least distance with enough weight within       a search
    the sum that min-p leaves                                 1 pass where there is a min-p
    the block in which the draw falls, then the token         1 pass and a block

A search halves an interval of distances, seen as the integers whose bits they are, and draws its ends in to
distances that there are, until one token or one distance is left in it: 31 passes at most; with 50,257 normally
distributed logits, 10 to 12 for a top-k of 50 and 12 to 21 for a top-p of 0.9. That for top-p goes by float32
exponentials first: where it ends, whole numbers tell in two passes whether this is the limit, and search on where it
is not. A pass costs V comparisons for top-k, V exponentials, or V weights of about 30 integer instructions, and V b
bytes of a row of elements of b bytes (and V for `seen`).

One program a row leaves most of a GPU idle at B = 1. To divide a row, every sum would be made by a
program for each slice, which could then stay in registers, and the slices' whole numbers added up in any
order between two steps of a search; the steps stay the same.

A decode step wants more of the same program: the token's embedding for the next step, and the row's counters
one further. It has them here, with a launch less.
"""

import torch
import triton
import triton.language as tl

from gpukernels.kernels.embedding import table_row
from gpukernels.numpy_ops.sampling import COLDEST, EXP2, HOTTEST, LOG2_E, UNIFORM_BITS, WEIGHT_BITS

# Elements at a time, warps: chosen from the compile report, not yet measured.
_BLOCK, _WARPS = 4096, 16

_E0, _E1, _E2, _E3, _E4, _E5, _E6 = map(tl.constexpr, EXP2)
_COLDEST, _HOTTEST, _LOG2_E = map(tl.constexpr, (COLDEST, HOTTEST, LOG2_E))
_UNIFORM_BITS, _WEIGHT_BITS = map(tl.constexpr, (UNIFORM_BITS, WEIGHT_BITS))
_UNIFORMS, _HEAVIEST = map(tl.constexpr, (1 << UNIFORM_BITS, 1 << WEIGHT_BITS))
_SHARE = tl.constexpr(2.0**-WEIGHT_BITS)
_INFINITY = tl.constexpr(0x7F800000)  # the bits of infinity

# What a token counts for in a sum: its weight; 1; or nearly its weight by the largest, in float32.
_WEIGHT, _ONE, _NEARLY = map(tl.constexpr, range(3))


@triton.jit
def _load_logits(x_ptr, seen_ptr, penalty, start, V, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Logits `start` to `start + BLOCK` after the penalty: -inf behind the last, inf for NaN. WHOLE: all are there."""
    col = start + tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + col).to(tl.float32)
    else:
        x = tl.load(x_ptr + col, col < V, other=float("-inf")).to(tl.float32)
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + col) if WHOLE else tl.load(seen_ptr + col, col < V, other=0)
        x = tl.where(seen != 0, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _better(x_ptr, seen_ptr, penalty, start, V, best, place, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Each lane's largest logit so far and where it stood first."""
    x = _load_logits(x_ptr, seen_ptr, penalty, start, V, BLOCK, WHOLE)
    better = x > best
    return tl.where(better, x, best), tl.where(better, start + tl.arange(0, BLOCK), place)


@triton.jit
def _weights(distance, rate):
    """2^40 * 2^-(distance * rate), rounded down as `numpy_ops.sampling` does: int64."""
    y = (tl.minimum(distance * rate, 63.0) * 16777216.0).to(tl.int32)
    fraction = (y << 8).to(tl.uint32, bitcast=True)
    power = _E5 - tl.umulhi(fraction, tl.full(fraction.shape, _E6, tl.uint32))
    power = _E4 - tl.umulhi(fraction, power)
    power = _E3 - tl.umulhi(fraction, power)
    power = _E2 - tl.umulhi(fraction, power)
    power = _E1 - tl.umulhi(fraction, power)
    power = _E0 - tl.umulhi(fraction, power)
    return (power.to(tl.int64) << (_WEIGHT_BITS - 31)) >> (y >> 24)


@triton.jit
def _kept(
    x_ptr, seen_ptr, penalty, start, V, peak, rate, limit, least,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of one block: what those within `limit` count for, whose weight is not below `least`, 0 for the others; who is
    within; the bits of the distances.
    """
    # abs: two zeros of different sign are 0 apart, not -0.
    distance = tl.abs(peak - _load_logits(x_ptr, seen_ptr, penalty, start, V, BLOCK, WHOLE))
    bits = distance.to(tl.int32, bitcast=True)
    near = bits <= limit
    if KIND == _ONE:
        weight = near.to(tl.int64)
    elif KIND == _NEARLY:
        weight = tl.where(near, tl.exp2(-(distance * rate)), 0.0)
    else:
        weight = _weights(distance, rate)
        weight = tl.where(near & (weight >= least), weight, 0)
    return weight, near, bits


@triton.jit
def _add(
    x_ptr, seen_ptr, penalty, start, V, peak, rate, limit, least, total, count, inner, outer,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One more block, by lanes: see `_total`."""
    weight, near, bits = _kept(x_ptr, seen_ptr, penalty, start, V, peak, rate, limit, least, BLOCK, WHOLE, KIND)
    inner = tl.maximum(inner, tl.where(near, bits, -1))
    outer = tl.minimum(outer, tl.where(near, _INFINITY, bits))
    return total + weight, count + near.to(tl.int32), inner, outer


@triton.jit
def _total(
    x_ptr, seen_ptr, penalty, V, peak, rate, limit, least,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The sum of what all that `_kept` keeps count for; how many are within `limit`; the bits of the largest
    distance that is, and of the least that is not.
    """
    total = tl.zeros((BLOCK,), tl.float32 if KIND == _NEARLY else tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    inner, outer = tl.full((BLOCK,), -1, tl.int32), tl.full((BLOCK,), _INFINITY, tl.int32)
    whole = V // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=4):
        total, count, inner, outer = _add(
            x_ptr, seen_ptr, penalty, start, V, peak, rate, limit, least, total, count, inner, outer,
            BLOCK, True, KIND,
        )  # fmt: skip
    if whole < V:
        total, count, inner, outer = _add(
            x_ptr, seen_ptr, penalty, whole, V, peak, rate, limit, least, total, count, inner, outer,
            BLOCK, False, KIND,
        )  # fmt: skip
    return tl.sum(total, 0), tl.sum(count, 0), tl.max(inner, 0), tl.min(outer, 0)


@triton.jit
def _search(
    x_ptr, seen_ptr, penalty, V, peak, rate, need, limit, total, near, guess,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A limit whose total is `need` or more and below which none is enough; the given one has enough.

    Its total, and how many are within. `guess` is tried first, then its neighbour; -1: there is none.
    """
    low, low_near = -1, 0  # a limit that has too little
    trial = tl.zeros((), tl.int32) + guess
    guesses = tl.where(trial < 0, 0, 2)
    while (limit - low > 1) & (near - low_near > 1) & (total != need):
        guessed = (guesses > 0) & (trial > low) & (trial < limit)
        middle = tl.where(guessed, trial, low + (limit - low) // 2)
        guesses -= 1
        new_total, new_near, inner, outer = _total(x_ptr, seen_ptr, penalty, V, peak, rate, middle, 0, BLOCK, KIND)
        if new_total >= need:
            limit, total, near, trial = inner, new_total, new_near, inner - 1
        else:
            low, low_near, trial = outer - 1, new_near, outer
    return limit, total, near


@triton.jit
def _find(x_ptr, seen_ptr, penalty, V, peak, rate, limit, least, target, BLOCK: tl.constexpr):
    """The block in which the sum of weights, in the order of the vocabulary, passes `target`; the sum before it."""
    block, before, so_far = 0, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    whole = V // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=4):
        here = so_far <= target
        block, before = tl.where(here, start, block), tl.where(here, so_far, before)
        weight, _near, _bits = _kept(x_ptr, seen_ptr, penalty, start, V, peak, rate, limit, least, BLOCK, True, _WEIGHT)
        so_far += tl.sum(weight, 0)
    # Where the target is not passed by now, it is in what is left.
    here = so_far <= target
    return tl.where(here, whole, block), tl.where(here, so_far, before)


@triton.jit
def _part(whole, part, more):
    """(whole * part + more) // 2^24 where the product needs more than 64 bits."""
    low = whole & (_UNIFORMS - 1)
    return (whole >> _UNIFORM_BITS) * part + ((low * part + more) >> _UNIFORM_BITS)


@triton.jit
def _between_0_and_1(x):
    """x, or the nearer end: what is infinite would be no integer. 0 for NaN."""
    return tl.where(x > 0, tl.minimum(x, 1.0), 0.0)


@triton.jit
def sample_row(
    row, x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, seen_ptr,
    uniform_ptr, seed_ptr, stream_ptr, step_ptr, token_ptr,
    lengths_ptr, weight_ptr, position_weight_ptr, embedded_ptr,
    V, stride_xb, stride_seen_b,
    P, C, stride_wv, stride_wc, stride_pp, stride_pc, stride_eb,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row, an int64; with lengths_ptr also what `sample_embed` does with the token."""
    x_ptr += row * stride_xb
    penalty = 1.0
    if penalty_ptr is not None:
        penalty = tl.load(penalty_ptr + row)
        seen_ptr += row * stride_seen_b
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row)
        if step_ptr is not None:
            next_step = tl.load(step_ptr + row) + 1
    whole = V // BLOCK * BLOCK

    best, place = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, whole, BLOCK, num_stages=4):
        best, place = _better(x_ptr, seen_ptr, penalty, start, V, best, place, BLOCK, True)
    if whole < V:
        best, place = _better(x_ptr, seen_ptr, penalty, whole, V, best, place, BLOCK, False)
    peak = tl.max(best, 0)
    token = tl.min(tl.where(best == peak, place, V), 0)
    finite = tl.abs(peak) < float("inf")

    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if finite & (temperature > 0):
            rate = tl.div_rn(_LOG2_E, tl.minimum(tl.maximum(temperature, _COLDEST), _HOTTEST))
            limit, near, least = _INFINITY, V, tl.zeros((), tl.int64)
            if top_k_ptr is not None:
                k = tl.load(top_k_ptr + row).to(tl.int64)
                if (k > 0) & (k < V):
                    limit, _count, near = _search(
                        x_ptr, seen_ptr, penalty, V, peak, rate, k, limit, tl.cast(V, tl.int64), near, -1, BLOCK, _ONE
                    )
            total, _near, _inner, _outer = _total(x_ptr, seen_ptr, penalty, V, peak, rate, limit, least, BLOCK, _WEIGHT)
            if top_p_ptr is not None:
                part = (_between_0_and_1(tl.load(top_p_ptr + row)) * _UNIFORMS).to(tl.int64)
                if part < _UNIFORMS:
                    need = tl.maximum(_part(total, part, _UNIFORMS - 1), 1)
                    most, enough = total.to(tl.float32) * _SHARE, need.to(tl.float32) * _SHARE
                    guess, _nearly, _count = _search(
                        x_ptr, seen_ptr, penalty, V, peak, rate, enough, limit, most, near, -1, BLOCK, _NEARLY
                    )
                    limit, total, near = _search(
                        x_ptr, seen_ptr, penalty, V, peak, rate, need, limit, total, near, guess, BLOCK, _WEIGHT
                    )
            if min_p_ptr is not None:
                least = tl.ceil(_between_0_and_1(tl.load(min_p_ptr + row)) * _HEAVIEST).to(tl.int64)
                if least > 0:
                    total, _near, _inner, _outer = _total(
                        x_ptr, seen_ptr, penalty, V, peak, rate, limit, least, BLOCK, _WEIGHT
                    )

            if uniform_ptr is not None:
                draw = (_between_0_and_1(tl.load(uniform_ptr + row)) * _UNIFORMS).to(tl.int64)
                draw = tl.minimum(draw, _UNIFORMS - 1)
            else:
                stream, step = tl.load(stream_ptr + row).to(tl.int32), tl.load(step_ptr + row).to(tl.int32)
                draw, _second, _third, _fourth = tl.philox(tl.load(seed_ptr + row).to(tl.int64), step, stream, 0, 0)
                draw = (draw >> (32 - _UNIFORM_BITS)).to(tl.int64)
            target = _part(total, draw, 0)

            block, before = _find(x_ptr, seen_ptr, penalty, V, peak, rate, limit, least, target, BLOCK)
            weight, _near, _bits = _kept(
                x_ptr, seen_ptr, penalty, block, V, peak, rate, limit, least, BLOCK, False, _WEIGHT
            )
            token = block + tl.sum((before + tl.cumsum(weight, 0) <= target).to(tl.int32), 0)
    token = tl.where(finite, token, -1)
    if lengths_ptr is not None:
        # One thread writes below what all have read above: length, step, `seen`. The sums have brought them together,
        # but not those of up to 32 logits, which each warp makes by itself.
        tl.debug_barrier()
        if length > 0:
            tl.store(lengths_ptr + row, length + 1)
            if step_ptr is not None:
                tl.store(step_ptr + row, next_step)
            known = tl.maximum(token, 0)
            if penalty_ptr is not None:
                tl.store(seen_ptr + known, tl.full((), 1, tl.uint8), finite)
            for start in range(0, C, BLOCK_C):
                col = start + tl.arange(0, BLOCK_C)
                mask = col < C
                y = table_row(weight_ptr, known, V, stride_wv, stride_wc, col, mask)
                if position_weight_ptr is not None:
                    y += table_row(position_weight_ptr, tl.minimum(length, P - 1), P, stride_pp, stride_pc, col, mask)
                tl.store(embedded_ptr + row * stride_eb + col, y.to(embedded_ptr.dtype.element_ty), mask)
        else:
            token = -1
    tl.store(token_ptr + row, token.to(tl.int64))


# What has one value a row may begin at any row: one binary serves them all.
_VALUES = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "penalty_ptr"]
_VALUES += ["uniform_ptr", "seed_ptr", "stream_ptr", "step_ptr", "lengths_ptr"]


@triton.jit(do_not_specialize_on_alignment=_VALUES)
def _sample_kernel(
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, seen_ptr,
    uniform_ptr, seed_ptr, stream_ptr, step_ptr, token_ptr,
    lengths_ptr, weight_ptr, position_weight_ptr, embedded_ptr,
    V, stride_xb, stride_seen_b,
    P, C, stride_wv, stride_wc, stride_pp, stride_pc, stride_eb,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row for each program."""
    sample_row(
        tl.program_id(0).to(tl.int64), x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, seen_ptr,
        uniform_ptr, seed_ptr, stream_ptr, step_ptr, token_ptr,
        lengths_ptr, weight_ptr, position_weight_ptr, embedded_ptr,
        V, stride_xb, stride_seen_b, P, C, stride_wv, stride_wc, stride_pp, stride_pc, stride_eb, BLOCK, BLOCK_C,
    )  # fmt: skip


def sample(
    logits, temperature, top_k, top_p, min_p, repetition_penalty, seen, uniforms, seed, stream, step,
    lengths=None, weight=None, position_weight=None, x=None,
):  # fmt: skip
    """(B,) int64. The contract is that of `gpukernels.sample`, or, with lengths, of `gpukernels.sample_embed`."""
    B, V = logits.shape
    logits = _unit_stride(logits)
    seen = None if seen is None else _unit_stride(seen.view(torch.uint8))
    options = (temperature, top_k, top_p, min_p, repetition_penalty, seen, uniforms, seed, stream, step)
    temperature, top_k, top_p, min_p, penalty, seen, uniforms, seed, stream, step = (
        each.float().contiguous() if each is not None and each.is_floating_point() else each for each in options
    )
    top_k, seed, stream, step = (None if each is None else each.contiguous() for each in (top_k, seed, stream, step))
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    embedding = (0,) * 7
    if weight is not None:
        positions = (0, 0, 0) if position_weight is None else (len(position_weight), *position_weight.stride())
        embedding = (positions[0], weight.shape[1], *weight.stride(), *positions[1:], x.stride(0))
    _sample_kernel[(B,)](
        logits, temperature, top_k, top_p, min_p, penalty, seen, uniforms, seed, stream, step, tokens,
        lengths, weight, position_weight, x,
        V, logits.stride(0), 0 if seen is None else seen.stride(0), *embedding,
        BLOCK=min(_BLOCK, max(16, triton.next_power_of_2(V))), BLOCK_C=512, num_warps=_WARPS,
    )  # fmt: skip
    return tokens


def _unit_stride(x):
    """x (B, V) with neighbouring elements in a row; padding behind the rows may stay, and keeps them aligned."""
    return x if x.stride(1) == 1 else x.contiguous()
