"""AdamW: every dtype and size, step numbers, and what a step may change."""

import numpy as np
import pytest
import torch
from kernel_cases import BRAIN, DEVICE, HALF, KINDS, SINGLE, ids
from truth_optimizer import STEPS, check_step, draw_state

import gpukernels
from gpukernels.kernels import optimizer as kernels
from gpukernels.verify.compare import host

kinds = pytest.mark.parametrize("kind", KINDS, ids=ids)


@kinds
@pytest.mark.parametrize("size", [0, 1, 16, 1023, 1024, 1025, 2500])
def test_sizes(kind, size):
    check_step(draw_state(kind, size) | {"step": kind.ints([7])}, weight_decay=0.1, decayed=size - size // 3)


@kinds
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.95, 0.99999)], ids=str)
def test_steps_and_betas(kind, step, betas):
    for shape, integer in (((1,), "int32"), ((), "int64")):
        check_step(draw_state(kind, 50) | {"step": kind.ints(np.full(shape, step), integer)}, betas=betas, eps=1e-3)


@pytest.mark.parametrize("kind", [HALF, BRAIN, SINGLE], ids=ids)
def test_gradients_of_another_dtype_and_a_scale(kind):
    for gradient in ("float16", "bfloat16", "float32"):
        state = draw_state(kind, 70, gradient=gradient) | {"step": kind.ints([2])}
        state["gradient_scale"] = SINGLE.array([2.0**-9])
        check_step(state, weight_decay=0.01)


def test_decay_stops_at_its_element():
    for decayed in (0, 1, 1023, 1024, 1025, None):
        check_step(draw_state(SINGLE, 1030) | {"step": SINGLE.ints([5])}, weight_decay=0.5, decayed=decayed)


def test_strided_gradients_are_read_and_offset_buffers_are_updated():
    state = draw_state(SINGLE, 60) | {"step": SINGLE.ints([5])}
    state["gradient"] = torch.stack([state["gradient"], torch.full_like(state["gradient"], torch.nan)], -1)[:, 0]
    for name in ("parameter", "first_moment", "second_moment"):
        store = torch.full((62,), 5.0, device=DEVICE)
        store[1:-1] = state[name]
        state[name] = store[1:-1]
    check_step(state)
    assert all((state[name]._base[[0, -1]] == 5).all() for name in ("parameter", "first_moment", "second_moment"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_place(value):
    state = draw_state(SINGLE, 4) | {"step": SINGLE.ints([1])}
    state["gradient"][2] = value
    gpukernels.adamw(**state)
    for name in ("parameter", "first_moment", "second_moment"):
        assert np.isfinite(host(state[name])).tolist() == [True, True, False, True]


def test_an_infinite_scale_is_not_hidden():
    state = draw_state(HALF, 4) | {"step": SINGLE.ints([1]), "gradient_scale": SINGLE.array([np.nan])}
    gpukernels.adamw(**state)
    assert not state["parameter"].isfinite().any()


def test_the_same_bits_every_time_and_wherever_an_element_lies():
    states = [draw_state(HALF, 2000) | {"step": SINGLE.ints([3])} for _ in range(2)]
    parts = {name: x[1000:1100].clone() if len(x) > 1 else x for name, x in states[0].items()}
    for state in (*states, parts):
        gpukernels.adamw(**state, weight_decay=0.1)
    for name in ("parameter", "master", "first_moment", "second_moment"):
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[0][name][1000:1100], parts[name])


def test_a_parameter_may_require_a_gradient_and_autograd_sees_the_change():
    state = draw_state(SINGLE, 8) | {"step": SINGLE.ints([1])}
    parameter = state["parameter"].requires_grad_()
    version, product = parameter._version, (parameter * parameter).sum()
    gpukernels.adamw(**state)
    assert parameter._version > version
    assert parameter.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_many_steps_of_torchs_adamw():
    """Each step may be off by the bound of one; the parameter moves by the rate at most, whatever its gradient."""
    start = SINGLE.draw(40)
    theirs = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([theirs], lr=2.0**-8, weight_decay=0.1)
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for number in range(1, 9):
        gradient = SINGLE.draw(40, seed=number)
        theirs.grad = gradient.double()
        optimizer.step()
        rate, step = SINGLE.array([2.0**-8]), SINGLE.ints([number])
        gpukernels.adamw(ours, gradient, m, v, step=step, learning_rate=rate, weight_decay=0.1)
        # float32's unit times 21 operations on the parameter, and on ten rates, at each step.
        limit = number * 21 * 2.0**-24 * (abs(host(start)) + 10 * 2.0**-8)
        assert (abs(host(ours) - host(theirs)) <= limit).all()


def test_bias_corrections_have_a_few_units_at_any_step():
    for beta in (0.5, 0.9, 0.95, 0.999, 0.9999, 0.99999):
        for step in (1, 2, 3, 10, 100, 1000, 9999, 10**6, 10**9):
            # With a zero gradient and v = 1 the parameter moves by the rate over the root of the correction.
            state = {name: torch.zeros(1, device=DEVICE) for name in ("parameter", "gradient")}
            state |= {name: torch.ones(1, device=DEVICE) for name in ("first_moment", "second_moment")}
            state |= {"step": SINGLE.ints([step]), "learning_rate": SINGLE.array([1.0])}
            gpukernels.adamw(**state, betas=(beta, 0.0), eps=1.0)
            want = -beta / -np.expm1(step * np.log(beta))
            assert abs(state["parameter"].item() - want) <= 8 * 2.0**-24 * abs(want), (beta, step)


def test_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "_adamw_kernel", {(3,): lambda *args, **options: launches.append(options)})
    gpukernels.adamw(**draw_state(SINGLE, 2049), step=SINGLE.ints([1]))
    assert len(launches) == 1
