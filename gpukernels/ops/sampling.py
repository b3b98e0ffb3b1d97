"""From logits to tokens."""

from gpukernels.ops.checks import (
    Array,
    check_floats,
    check_integers,
    check_no_gradient,
    check_shape,
    check_written,
    dtype_name,
    implementation,
    shape,
)


def sample(
    logits: Array,
    *,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
    repetition_penalty: Array | None = None,
    seen: Array | None = None,
    uniforms: Array | None = None,
    seed: Array | None = None,
    stream: Array | None = None,
    step: Array | None = None,
) -> Array:
    """The next token of every row, drawn from softmax(logits / temperature), or the likeliest one. No gradient.

    In this order, each on what the one before it left: repetition penalty, temperature, top-k, top-p,
    min-p, as in transformers. Each of the last three is a threshold: tokens that tie there are all kept.
    The draw inverts the cumulative distribution, in the order of the vocabulary, at a uniform number.

    Every option is an array with a value for each row, so that rows of different requests share a call
    and nothing is asked of the device. Values are not checked: what lies outside its range counts as the end
    of it, but for a penalty, which is taken as it stands. None leaves a step out for all rows.

    Args:
        logits: (B, V), V of 1 to 2^22; read as float32. -inf is a token that cannot be.
        temperature: (B,) floats, what the logits are divided by; a row with 0 takes the largest logit, the
            lowest id of several, and draws nothing. None: 0 for all.
        top_k: (B,) integers; the k largest logits are kept. 0: all.
        top_p: (B,) floats from 0 to 1, in units of 2^-24; the smallest set of likeliest tokens whose
            probabilities reach this sum is kept, one token at least. Holtzman et al., arXiv 1904.09751.
        min_p: (B,) floats from 0 to 1; kept is what has at least this fraction of the likeliest token's
            probability. Nguyen et al., arXiv 2407.01082.
        repetition_penalty: (B,) floats above 0; logits of `seen` tokens are divided by it where positive,
            multiplied where negative. Keskar et al., arXiv 1909.05858.
        seen: (B, V) bool; goes with `repetition_penalty`.
        uniforms: (B,) floats from 0 up to and without 1, in units of 2^-24; or
        seed, stream, step: (B,) integers, from which `uniform` makes them.

    Returns:
        (B,) int64 tokens. -1 where the largest logit is not finite, or a logit is NaN: the model overflowed.

    Raises:
        TypeError: arrays of different kinds, or of the wrong type of numbers.
        ValueError: shapes that do not match; a draw without numbers, or with two sources of them; logits
            that ask for a gradient.

    Numerics: probabilities are whole numbers (`gpukernels.numpy_ops.sampling`), so that every
    implementation makes the same choice from the same logits and numbers, always, and a row's does not
    depend on its neighbours. A token p times as likely as the best has p within 2^-22 (1 + ln(1 / p)) of
    itself and 2^-40; below 2^-40 it is 0.
    Cost: one read of the logits for the largest; up to 31 more, from the L2 cache, for top-k, and as
    many for top-p; two or three for the draw.
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seen": seen,
        "uniforms": uniforms,
        "seed": seed,
        "stream": stream,
        "step": step,
    }
    run = implementation("sample", {"logits": logits}, **options)
    _check_sampling("sample", logits, options)
    return run.sample(logits, **options)


def sample_embed(
    logits: Array,
    *,
    lengths: Array,
    weight: Array,
    position_weight: Array | None = None,
    x: Array,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
    repetition_penalty: Array | None = None,
    seen: Array | None = None,
    uniforms: Array | None = None,
    seed: Array | None = None,
    stream: Array | None = None,
    step: Array | None = None,
) -> Array:
    """`sample`, and what a decode step does with the token: embeds it and moves the row one on. No gradient.

    For every row b in use, one with lengths[b] > 0, that is the number of tokens before the new one:

        tokens[b] = sample(logits)[b]
        x[b, 0] = weight[tokens[b]] + position_weight[min(lengths[b], P - 1)]
        lengths[b] += 1;  step[b] += 1;  seen[b, tokens[b]] = True

    Nothing of a row that is not in use is written, and its token is -1. Where the logits are not finite the
    token is -1 too, and that of id 0 is embedded.

    Args:
        logits, temperature to step: as in `sample`; `step` and `seen` are written.
        lengths: (B,) int32; written.
        weight: (V', C), the table of tokens; V' is V or more.
        position_weight: (P, C), the table of positions, or None.
        x: (B, 1, C), contiguous rows, of the activations' dtype; written.

    Returns:
        (B,) int64 tokens. Raises as `sample` and `embedding` do.
    """
    op = "sample_embed"
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seen": seen,
        "uniforms": uniforms,
        "seed": seed,
        "stream": stream,
        "step": step,
    }
    arrays = {"logits": logits, "lengths": lengths, "weight": weight, "x": x}
    run = implementation(op, arrays, position_weight=position_weight, **options)
    _check_sampling(op, logits, options)
    check_floats(op, weight=weight, x=x, position_weight=position_weight)
    batch, vocabulary = logits.shape
    check_shape(op, "lengths", lengths, (batch,), "one length for each row")
    if dtype_name(lengths.dtype) != "int32":
        raise TypeError(f"{op}: lengths must be int32, got {dtype_name(lengths.dtype)}")
    if weight.ndim != 2 or weight.shape[0] < vocabulary:
        raise ValueError(f"{op}: weight must be ({vocabulary}, C) or longer, to match logits, got {shape(weight)}")
    check_shape(op, "x", x, (batch, 1, weight.shape[1]), "to match logits and weight")
    if position_weight is not None and (position_weight.ndim != 2 or position_weight.shape[1] != weight.shape[1]):
        wanted = f"(P, {weight.shape[1]})"
        raise ValueError(f"{op}: position_weight must be {wanted} to match weight, got {shape(position_weight)}")
    check_written(op, "x", x)
    for name, array in (("lengths", lengths), ("step", step)):
        if array is not None:
            check_written(op, name, array, whole=True)
    if seen is not None:
        check_written(op, "seen", seen)
    check_no_gradient(op, weight=weight, position_weight=position_weight, x=x)
    return run.sample_embed(logits, lengths=lengths, weight=weight, position_weight=position_weight, x=x, **options)


def _check_sampling(op: str, logits: Array, options: dict[str, Array | None]) -> None:
    check_floats(op, logits=logits)
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= 2**22:
        raise ValueError(f"{op}: logits must be (B, V) with V of 1 to {2**22}, got {shape(logits)}")
    for name, array in options.items():
        if array is None:
            continue
        if name == "seen":
            check_shape(op, name, array, tuple(logits.shape), "to match logits")
            if dtype_name(array.dtype) != "bool":
                raise TypeError(f"{op}: seen must be bool, got {dtype_name(array.dtype)}")
            continue
        check_shape(op, name, array, (logits.shape[0],), "one value for each row")
        if name in ("top_k", "seed", "stream", "step"):
            check_integers(op, name, array)
        else:
            check_floats(op, **{name: array})
    penalty, seen = options["repetition_penalty"], options["seen"]
    if (penalty is None) != (seen is None):
        given = "seen" if seen is not None else "repetition_penalty"
        raise ValueError(f"{op}: repetition_penalty and seen go together, got only {given}")
    sources = [name for name in ("uniforms", "seed", "stream", "step") if options[name] is not None]
    wanted = (["uniforms"], ["seed", "stream", "step"], *([[]] if options["temperature"] is None else []))
    if sources not in wanted:
        got = ", ".join(sources) or "nothing"
        raise ValueError(f"{op}: a draw needs uniforms, or seed, stream and step, got {got}")
    check_no_gradient(op, logits=logits)


def uniform(seed: Array, stream: Array, step: Array) -> Array:
    """Numbers in [0, 1), multiples of 2^-24, from (seed, stream, step) and nothing else.

    The first 24 bits of Philox-4x32-10 with the key (seed low, seed high) and the counter (step, stream,
    0, 0): Triton's `tl.philox(seed, step, stream, 0, 0)`. What `sample` draws with.

    Args:
        seed: (B,) int32 or int64.
        stream, step: (B,) int32 or int64, of which the low 32 bits count.

    Returns:
        (B,) float32.

    Raises:
        TypeError: arrays of different kinds, or not integers.
        ValueError: shapes that do not match.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    run = implementation("uniform", {"seed": seed, "stream": stream, "step": step})
    if seed.ndim != 1:
        raise ValueError(f"uniform: seed must be (B,), got {shape(seed)}")
    for name, array in (("seed", seed), ("stream", stream), ("step", step)):
        check_integers("uniform", name, array)
        check_shape("uniform", name, array, tuple(seed.shape), "to match seed")
    return run.uniform(seed, stream, step)
