"""What one step of an optimizer should come to, in float64, whatever state it starts from."""

import numpy as np
import torch
from truth import bound, host

import gpukernels
from gpukernels.kernels.device import INTERPRETING

STEPS = [1, 2, 1000, 10**6]


def draw_state(kind, size, *, gradient=None, seed=0):
    """Arguments of `adamw`: a parameter of `kind`, a gradient of `gradient`'s dtype or the same, and the rest."""
    wide = kind._replace(dtype="float64" if kind.dtype == "float64" else "float32")
    random = np.random.default_rng([seed, size])
    exact = random.standard_normal(size)
    state = {
        "parameter": kind.array(exact),
        "gradient": kind._replace(dtype=gradient or kind.dtype).array(random.standard_normal(size)),
        "first_moment": wide.array(0.1 * random.standard_normal(size)),
        "second_moment": wide.array(random.uniform(1e-6, 1, size)),
        "learning_rate": wide.array([2.0**-10]),
    }
    return state | ({"master": wide.array(exact)} if kind.dtype in ("float16", "bfloat16") else {})


def check_step(state, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decayed=None):
    """Takes the step, in place, and compares all that it changed; the rest stays as it was."""
    before = {name: host(array) for name, array in state.items()}
    options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "decayed": decayed}
    assert gpukernels.adamw(**state, **options) is None

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
    wanted = {"first_moment": (new_m, m_size), "second_moment": (new_v, v_size)}
    wanted |= {name: (new_p, p_size) for name in ("parameter", "master") if name in state}
    for name, array in state.items():
        if name not in wanted:
            np.testing.assert_array_equal(host(array), before[name], err_msg=f"{name} was changed")
            continue
        value, size = wanted[name]
        error = abs(host(array) - value)
        limit = bound(str(array.dtype).removeprefix("torch."), 1, size)
        assert (error <= limit).all(), f"{name} is off by {np.max(error / limit)} times the bound"
    if "master" in state and not (INTERPRETING and state["parameter"].dtype == torch.bfloat16):
        # Triton's interpreter cuts bfloat16 off, where the GPU rounds it.
        master, dtype = state["master"], state["parameter"].dtype
        rounded = master.to(dtype) if isinstance(master, torch.Tensor) else master.astype(dtype)
        np.testing.assert_array_equal(host(state["parameter"]), host(rounded))
