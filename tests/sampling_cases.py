"""Rows for the sampler, and a sampler in ten lines of Python's whole numbers to judge by."""

import numpy as np
import torch

from gpukernels.numpy_ops.sampling import EXP2, LOG2_E


def mixed(seed: int, rows: int, size: int) -> tuple[np.ndarray, dict]:
    """Logits (rows, size) and every option of `sample`, each on in some rows: ties, -inf, the ends of all ranges."""
    random = np.random.default_rng([seed, size])
    logits = random.choice([0.1, 3, 50], (rows, 1)) * random.standard_normal((rows, size))
    logits = np.where(random.random((rows, 1)) < 0.5, np.round(logits), logits).astype(np.float32)
    logits[random.random((rows, size)) < random.choice([0, 0.3], (rows, 1))] = -np.inf
    logits[:, random.integers(size)] = 1  # one is finite

    def floats(*values):
        return random.choice(values, rows).astype(np.float32)

    return logits, {
        "temperature": floats(0, 1e-6, 0.3, 1, 2, 1e6),
        "top_k": random.choice([0, 1, 2, 5, size // 2, size, 2 * size + 1], rows).astype(np.int32),
        "top_p": floats(0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1),
        "min_p": floats(0, 1e-12, 0.01, 0.5, 1),
        "repetition_penalty": floats(0.5, 1, 1.3),
        "seen": random.random((rows, size)) < 0.3,
        "uniforms": floats(0, 2**-24, 0.123, 0.5, 0.77, 1 - 2**-24),
    }


def on(library: str, array, device: str = "cpu"):
    return array if library == "numpy" else torch.tensor(array).to(device)


def plain(x, temperature, uniforms, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=None) -> int:
    """One row by the definitions, token by token, in whole numbers that do not end."""
    one = np.float32
    with np.errstate(all="ignore"):
        if seen is not None:
            changed = [v * repetition_penalty if v < 0 else v / repetition_penalty for v in x]
            x = [new if is_seen else old for new, old, is_seen in zip(changed, x, seen, strict=True)]
        if not temperature > 0:
            return max(range(len(x)), key=x.__getitem__)
        rate, largest = one(LOG2_E) / one(temperature), max(x)
        far = [largest - v for v in x]
        weight = [power(int(min(one(d * rate), one(63)) * one(2**24))) for d in far]
    if 0 < top_k < len(x):
        furthest = sorted(far)[top_k - 1]
        weight = [w if d <= furthest else 0 for w, d in zip(weight, far, strict=True)]
    if top_p < 1:
        enough, so_far = int(top_p * 2**24) * sum(weight), 0
        for d, w in sorted(zip(far, weight, strict=True), key=lambda each: each[0]):
            so_far, last = so_far + w, d
            if so_far << 24 >= enough:
                break
        weight = [w if d <= last else 0 for w, d in zip(weight, far, strict=True)]
    weight = [w if w >= float(min_p) * 2**40 else 0 for w in weight]
    target, so_far = int(uniforms * 2**24) * sum(weight), 0
    for token, w in enumerate(weight):
        so_far += w
        if so_far << 24 > target:
            return token
    raise AssertionError("nothing is left")


def power(y: int) -> int:
    """2^40 2^-(y / 2^24), rounded down at every step."""
    value = EXP2[-1]
    for coefficient in EXP2[-2::-1]:
        value = coefficient - (value * (y % 2**24 << 8) >> 32)
    return value << 9 >> (y >> 24)
