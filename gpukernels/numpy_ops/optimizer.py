"""Optimizers: in place, in blocks that stay in a core's cache."""

import math

import numpy as np

from gpukernels.numpy_ops.blocks import BLOCK


def adamw(
    parameter,
    gradient,
    first_moment,
    second_moment,
    *,
    step,
    learning_rate,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decayed=None,
    master=None,
    gradient_scale=None,
):
    dtype = first_moment.dtype
    count, rate = int(step.reshape(())), dtype.type(learning_rate.reshape(()))
    scale = None if gradient_scale is None else dtype.type(gradient_scale.reshape(()))
    correction1, correction2 = (dtype.type(-math.expm1(count * math.log(b)) if b else 1.0) for b in betas)
    keep1, keep2 = (dtype.type(1 - b) for b in betas)
    exact = parameter if master is None else master
    decayed = parameter.size if decayed is None else decayed
    for start in range(0, parameter.size, BLOCK):
        part = slice(start, start + BLOCK)
        p, m, v = exact[part], first_moment[part], second_moment[part]
        g = gradient[part].astype(dtype)
        if scale is not None:
            g *= scale
        m += keep1 * (g - m)
        g *= g
        v += keep2 * (g - v)
        change = m / correction1
        change /= np.sqrt(v / correction2) + dtype.type(eps)
        decaying = max(0, decayed - start)
        change[:decaying] += dtype.type(weight_decay) * p[:decaying]
        p -= rate * change
        if master is not None:
            parameter[part] = p
