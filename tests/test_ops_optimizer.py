"""AdamW in NumPy and in plain torch against float64 and torch's own."""

import numpy as np
import pytest
import torch
from kinds import KINDS, every_kind
from truth import Kind
from truth_optimizer import STEPS, check_step, draw_state

import gpukernels
from gpukernels.numpy_ops.blocks import BLOCK
from gpukernels.verify.compare import host

OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "some decay": {"weight_decay": 0.1, "decayed": 5},
    "no decay": {"weight_decay": 0.1, "decayed": 0},
    "no memory": {"betas": (0.0, 0.0)},
    "long memory": {"betas": (0.95, 0.99999), "eps": 1e-3},
}


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("step", STEPS)
def test_one_step(kind, options, step):
    for size, shape, integer in ((17, (1,), "int32"), (5, (), "int64")):
        state = draw_state(kind, size) | {"step": kind.ints(np.full(shape, step), integer)}
        check_step(state, **options)
    state["gradient_scale"] = draw_state(kind, 1)["learning_rate"] * 3
    check_step(state, **options)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[5]], ids="-".join)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_sizes(kind, size):
    state = draw_state(kind, size) | {"step": kind.ints([3])}
    check_step(state, weight_decay=0.1, decayed=size - size // 3)


@pytest.mark.parametrize("kind", KINDS[:3], ids="-".join)
def test_blocks_of_numpy_decay_up_to_the_same_element(kind):
    for decayed in (BLOCK - 3, BLOCK, BLOCK + 3):
        check_step(draw_state(kind, 2 * BLOCK) | {"step": kind.ints([3])}, weight_decay=0.5, decayed=decayed)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_it_is_torchs_adamw(library):
    """Ten steps from zero, in float64: the same to its last digits."""
    kind, random = Kind(library, "float64"), np.random.default_rng(0)
    start, gradients = random.standard_normal(33), random.standard_normal((10, 33))
    theirs = [torch.nn.Parameter(torch.tensor(part)) for part in (start[:20], start[20:])]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.0**-8, betas=(0.9, 0.95), eps=1e-8)
    ours, m, v = kind.array(start), kind.array(np.zeros(33)), kind.array(np.zeros(33))
    for number, gradient in enumerate(gradients, 1):
        for parameter, part in zip(theirs, (gradient[:20], gradient[20:]), strict=True):
            parameter.grad = torch.tensor(part)
        optimizer.step()
        gpukernels.adamw(
            ours,
            kind.array(gradient),
            m,
            v,
            step=kind.ints([number]),
            learning_rate=kind.array([2.0**-8]),
            betas=(0.9, 0.95),
            weight_decay=0.1,
            decayed=20,
        )
        want = np.concatenate([host(parameter) for parameter in theirs])
        np.testing.assert_allclose(host(ours), want, rtol=1e-13, atol=1e-15)


@every_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_place(kind, value):
    state = draw_state(kind, 4) | {"step": kind.ints([1])}
    state["gradient"][2] = value
    gpukernels.adamw(**state)
    for name in ("parameter", "first_moment", "second_moment"):
        assert np.isfinite(host(state[name])).tolist() == [True, True, False, True]
