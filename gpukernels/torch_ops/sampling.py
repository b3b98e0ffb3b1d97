"""From logits to tokens, all rows at once: `gpukernels.numpy_ops.sampling` says what the whole numbers are."""

import torch

from gpukernels.numpy_ops.sampling import COLDEST, EXP2, HOTTEST, LOG2_E, UNIFORM_BITS, WEIGHT_BITS

_MASK = 0xFFFFFFFF


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
    x, count = logits.float(), logits.shape[1]
    if repetition_penalty is not None:
        penalty = repetition_penalty.float()[:, None]
        x = torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)
    x = x.masked_fill(x.isnan(), torch.inf)
    peak, best = x.max(1, keepdim=True).values, x.argmax(1)
    tokens = best
    if temperature is not None:
        rate = LOG2_E / temperature.double().clamp(COLDEST, HOTTEST).float()
        distance = peak - x
        weights = _weights(distance, rate[:, None])
        ordered = distance.sort(1).values
        if top_k is not None:
            some = torch.where((top_k > 0) & (top_k < count), top_k, count).long()
            weights = weights.masked_fill(distance > ordered.gather(1, some[:, None] - 1), 0)
        if top_p is not None:
            sums = weights.gather(1, distance.argsort(1)).cumsum(1)
            part = (_between_0_and_1(top_p.float()) * 2**UNIFORM_BITS).long()
            enough = _part(sums[:, -1], part, 2**UNIFORM_BITS - 1).clamp(min=1)
            place = (sums < enough[:, None]).sum(1, keepdim=True).clamp(max=count - 1)
            limit = torch.where(part[:, None] < 2**UNIFORM_BITS, ordered.gather(1, place), torch.inf)
            weights = weights.masked_fill(distance > limit, 0)
        if min_p is not None:
            least = (_between_0_and_1(min_p.float()) * 2**WEIGHT_BITS).ceil().long()
            weights = weights.masked_fill(weights < least[:, None], 0)
        if uniforms is None:
            draws = _philox(seed, stream, step)
        else:
            # float16 holds no 2^24.
            wide = uniforms.to(torch.promote_types(uniforms.dtype, torch.float32))
            draws = (_between_0_and_1(wide) * 2**UNIFORM_BITS).long().clamp(max=2**UNIFORM_BITS - 1)
        sums = weights.cumsum(1)
        drawn = (sums <= _part(sums[:, -1], draws, 0)[:, None]).sum(1)
        tokens = torch.where(temperature > 0, drawn, tokens)
    return torch.where(peak[:, 0].isfinite(), tokens, -1)


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
    tokens = torch.where(in_use, tokens, -1)
    known = tokens.clamp(min=0)
    embedded = weight[known].to(x.dtype)
    if position_weight is not None:
        embedded = embedded + position_weight[lengths.clamp(max=len(position_weight) - 1).long()].to(x.dtype)
    x.copy_(torch.where(in_use[:, None], embedded, x[:, 0])[:, None])
    lengths += in_use
    if step is not None:
        step += in_use
    if seen is not None:
        seen |= (torch.arange(seen.shape[1], device=seen.device) == known[:, None]) & (tokens >= 0)[:, None]
    return tokens


def uniform(seed, stream, step):
    return _philox(seed, stream, step).float() * 2.0**-UNIFORM_BITS


def _between_0_and_1(x):
    """x, or the nearer end: what is infinite would be no integer. 0 for NaN."""
    return x.nan_to_num(0.0).clamp(0, 1)


def _weights(distance, rate):
    y = ((distance * rate).clamp(max=63) * 2**24).long()
    fraction = (y & 0xFFFFFF) << 8
    power = torch.full_like(y, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        power = coefficient - (power * fraction >> 32)
    return (power << (WEIGHT_BITS - 31)) >> (y >> 24)


def _part(whole, part, more):
    """(whole * part + more) // 2^24 where the product needs more than 64 bits."""
    high, low = whole >> UNIFORM_BITS, whole & (2**UNIFORM_BITS - 1)
    return high * part + (low * part + more >> UNIFORM_BITS)


def _philox(seed, stream, step):
    """Philox-4x32-10. Of a product that wraps around 64 bits, the high and low halves are still right."""
    seed, c0, c1 = seed.long(), step.long() & _MASK, stream.long() & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) & _MASK ^ c1 ^ k0, b & _MASK, (a >> 32) & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0 >> (32 - UNIFORM_BITS)
