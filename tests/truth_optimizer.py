"""One step of an optimizer, against `gpukernels.verify.truth_optimizer`."""

import numpy as np
import torch

import gpukernels
from gpukernels.kernels.device import INTERPRETING
from gpukernels.verify.compare import host
from gpukernels.verify.truth import bound
from gpukernels.verify.truth_optimizer import true_adamw

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

    wanted = true_adamw(before, **options)
    for name, array in state.items():
        if name not in wanted:
            np.testing.assert_array_equal(host(array), before[name], err_msg=f"{name} was changed")
            continue
        value, size, *_ = wanted[name]
        error = abs(host(array) - value)
        limit = bound(str(array.dtype).removeprefix("torch."), 1, size)
        assert (error <= limit).all(), f"{name} is off by {np.max(error / limit)} times the bound"
    if "master" in state and not (INTERPRETING and state["parameter"].dtype == torch.bfloat16):
        # Triton's interpreter cuts bfloat16 off, where the GPU rounds it.
        master, dtype = state["master"], state["parameter"].dtype
        rounded = master.to(dtype) if isinstance(master, torch.Tensor) else master.astype(dtype)
        np.testing.assert_array_equal(host(state["parameter"]), host(rounded))
