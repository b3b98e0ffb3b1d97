"""What one step of an optimizer should come to, in float64, whatever state it starts from."""

import numpy as np

from gpukernels.verify.truth import Truth


def true_adamw(before, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decayed=None):
    """What `adamw` changes of the arrays `before`, by name: Truths."""
    p, g = before.get("master", before["parameter"]), before["gradient"] * before.get("gradient_scale", 1.0)
    m, v = before["first_moment"], before["second_moment"]
    rate, step = before["learning_rate"], before["step"]
    new_m, new_v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    m_size = abs(m) + (1 - betas[0]) * (abs(g) + abs(m))
    v_size = v + (1 - betas[1]) * (g**2 + v)
    corrections = [-np.expm1(step * np.log(beta)) if beta else np.ones(1) for beta in betas]
    root = np.sqrt(new_v / corrections[1])
    decay = weight_decay * (np.arange(len(p)) < (len(p) if decayed is None else decayed))
    change = new_m / corrections[0] / (root + eps)
    # The root's error, relative to it, is half that of v.
    change_size = m_size / corrections[0] / (root + eps) * (1 + v_size / np.maximum(new_v, 1e-300))
    new_p, p_size = p - rate * (change + decay * p), abs(p) * (1 + rate * decay) + rate * change_size
    wanted = {"first_moment": Truth(new_m, m_size, 1), "second_moment": Truth(new_v, v_size, 1)}
    return wanted | {name: Truth(new_p, p_size, 1) for name in ("parameter", "master") if name in before}
