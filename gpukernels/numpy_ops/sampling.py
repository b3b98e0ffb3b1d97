"""From logits to tokens, row by row.

A token's chance is a whole number, its weight, and the same one in every implementation: so are all sums
of weights, in whatever order they are made, and the choice. With the logits x in float32:

    y = (max(x) - x) * (log2(e) / temperature)         each operation rounded to float32
    weight = 2^40 * 2^-y                               y in steps of 2^-24, by the polynomial EXP2

which is exp(x / temperature) up to a factor that all tokens share. For a token p times as likely as the
best it is off by 2^-22 (1 + ln(1 / p)) of itself at most: four roundings of y (of log2(e), of its quotient,
of the difference and of the product), its steps, and the polynomial; and by 1, what a whole number leaves out.
Below p = 2^-40 it is 0.
"""

import math

import numpy as np

#: 2^31 2^-f = e0 - e1 f + e2 f^2 - ... for f from 0 to 1: within 4.4e-9 of itself in 32-bit arithmetic that
#: rounds down, exact at 0, and never rising. Fitted for the least relative error, with the ends held.
EXP2 = (2147483648, 1488521968, 515877632, 119164179, 20568337, 2734809, 233163)
WEIGHT_BITS = 40  # of the likeliest token's weight: a sum of 2^22 of them fits 63 bits
UNIFORM_BITS = 24  # of a uniform number, and of top_p
#: Temperatures further out behave as these: their reciprocals are normal numbers.
COLDEST, HOTTEST = 2.0**-126, 2.0**126
LOG2_E = float(np.float32(1.4426950408889634))

_MASK = 0xFFFFFFFF
_BLOCK = 16384  # elements at a time, so that what stands between two steps stays in a core's cache


def sample(
    logits,
    *,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    seen=None,
    uniforms=None,
    seed=None,
    stream=None,
    step=None,
):
    tokens = np.empty(len(logits), np.int64)
    for row in range(len(logits)):
        x = logits[row].astype(np.float32)
        if repetition_penalty is not None:
            _penalize(x, np.flatnonzero(seen[row]), np.float32(repetition_penalty[row]))
        best = int(x.argmax())  # of a NaN, where there is one
        if not np.isfinite(x[best]):
            tokens[row] = -1
        elif temperature is None or not temperature[row] > 0:
            tokens[row] = best
        else:
            options = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
            options = {name: each[row] for name, each in options.items() if each is not None}
            ids, weights = candidates(x, temperature[row], **options)
            if uniforms is None:
                draw = _philox(int(seed[row]), int(stream[row]), int(step[row]))
            else:
                draw = min(int(_between_0_and_1(uniforms[row]) * 2**UNIFORM_BITS), 2**UNIFORM_BITS - 1)
            sums = np.cumsum(weights)
            tokens[row] = ids[np.searchsorted(sums, draw * int(sums[-1]) >> UNIFORM_BITS, side="right")]
    return tokens


def sample_embed(
    logits,
    *,
    lengths,
    weight,
    position_weight=None,
    x,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    seen=None,
    uniforms=None,
    seed=None,
    stream=None,
    step=None,
):
    tokens = sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seen=seen,
        uniforms=uniforms,
        seed=seed,
        stream=stream,
        step=step,
    )
    in_use = lengths > 0
    tokens[~in_use] = -1
    rows = np.flatnonzero(in_use)
    known = np.maximum(tokens[rows], 0)
    embedded = weight[known].astype(x.dtype, copy=False)
    if position_weight is not None:
        embedded += position_weight[np.minimum(lengths[rows], len(position_weight) - 1)]
    x[rows, 0] = embedded
    lengths[rows] += 1
    if step is not None:
        step[rows] += 1
    if seen is not None:
        finite = tokens[rows] >= 0
        seen[rows[finite], known[finite]] = True
    return tokens


def uniform(seed, stream, step):
    draws = [_philox(*map(int, row)) for row in zip(seed, stream, step, strict=True)]
    return np.array(draws, np.float32) * np.float32(2.0**-UNIFORM_BITS)


def candidates(x, temperature, top_k=0, top_p=1.0, min_p=0.0) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn, ascending, and their weights; x (V,) float32 with a finite maximum."""
    distance = x.max() - x
    ids = np.arange(x.size)
    if 0 < top_k < x.size:
        kept = distance <= np.partition(distance, top_k - 1)[top_k - 1]
        ids, distance = ids[kept], distance[kept]
    rate = np.float32(LOG2_E) / np.float32(np.clip(float(temperature), COLDEST, HOTTEST))
    part = int(_between_0_and_1(np.float32(top_p)) * 2**UNIFORM_BITS)
    if part < 2**UNIFORM_BITS:
        nearest = np.sort(distance)
        sums = np.cumsum(_weights(nearest, rate))
        enough = max(1, -(-part * int(sums[-1]) >> UNIFORM_BITS))  # rounded up
        kept = distance <= nearest[np.searchsorted(sums, enough)]
        ids, distance = ids[kept], distance[kept]
    weights = _weights(distance, rate)
    least = math.ceil(_between_0_and_1(np.float32(min_p)) * 2**WEIGHT_BITS)
    if least > 0:
        kept = weights >= least
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _between_0_and_1(x) -> float:
    """x, or the nearer end: what is infinite would be no integer. 0 for NaN."""
    return min(float(x), 1.0) if x > 0 else 0.0


def _weights(distance, rate):
    """The weights of tokens at these distances from the largest logit: int64."""
    weights = np.empty(distance.size, np.int64)
    fraction, octave = np.empty((2, min(distance.size, _BLOCK)), np.int64)
    for start in range(0, distance.size, _BLOCK):
        power = weights[start : start + _BLOCK]
        fraction, octave = fraction[: power.size], octave[: power.size]
        y = distance[start : start + _BLOCK] * rate
        np.minimum(y, 63, out=y)
        y *= np.float32(2**24)
        octave[:] = y
        np.bitwise_and(octave, 0xFFFFFF, out=fraction)
        fraction <<= 8
        power[:] = EXP2[-1]
        for coefficient in EXP2[-2::-1]:
            power *= fraction
            power >>= 32
            np.subtract(coefficient, power, out=power)
        octave >>= 24
        power <<= WEIGHT_BITS - 31
        power >>= octave
    return weights


def _penalize(x, ids, penalty):
    values = x[ids]
    x[ids] = np.where(values < 0, values * penalty, values / penalty)


def _philox(seed: int, stream: int, step: int) -> int:
    """24 random bits: Philox-4x32-10 with the key (seed low, seed high), as `tl.philox(seed, step, stream, 0, 0)`."""
    c0, c1, c2, c3 = step & _MASK, stream & _MASK, 0, 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0 >> (32 - UNIFORM_BITS)
