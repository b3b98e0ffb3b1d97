"""Schedules: the numbers of transformers' own where it has them, their corners, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import optimization

from model.errors import ModelError
from model.finetune.schedule import KINDS, Schedule


def transformers_rates(make, steps, **options):
    """The rates that a scheduler of transformers gives a parameter, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


# Behind the warm-up, and without a floor: transformers' first step of a warm-up has the rate 0, ours has not.
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("linear", optimization.get_linear_schedule_with_warmup),
        ("cosine", optimization.get_cosine_schedule_with_warmup),
    ],
)
def test_decay_is_that_of_transformers(kind, make, warmup):
    want = transformers_rates(make, 40, num_warmup_steps=warmup, num_training_steps=40)
    ours = Schedule(kind, 3e-4, warmup, 40)
    assert [ours(step) for step in range(warmup, 40)] == pytest.approx(want[warmup:], rel=1e-12)


def test_inverse_sqrt_is_that_of_the_transformer_paper():
    # d ** -0.5 min(step ** -0.5, step warmup ** -1.5), steps from 1; its peak is our rate.
    width, warmup = 512, 30
    schedule = Schedule("inverse_sqrt", (width * warmup) ** -0.5, warmup, 100)
    for step in range(1, 101):
        want = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule(step - 1) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_linear_and_loses_no_step(kind):
    schedule = Schedule(kind, 1.0, 4, 10)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_floor_is_reached_behind_the_last_step_and_kept():
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind, 1.0, 2, 12, floor=0.1)
        assert schedule(2) == 1.0
        assert schedule(7) == pytest.approx(0.55)  # half-way, for both
        assert 0.1 < schedule(11) < 0.2
        assert schedule(12) == schedule(1000) == 0.1
    assert Schedule("inverse_sqrt", 1.0, 0, 12, floor=0.4)(100) == 0.4


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rate=st.floats(1e-9, 1e3),
    steps=st.integers(1, 200),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_rate_is_between_floor_and_rate_and_falls_after_the_warm_up(kind, rate, steps, shares):
    warmup, floor = round(shares[0] * steps), shares[1] * rate
    schedule = Schedule(kind, rate, warmup, steps, floor)
    rates = [schedule(step) for step in range(steps + 3)]
    rounding = rate * 4 * 2**-52  # of three operations on numbers up to the rate
    assert all(0 < each <= rate + rounding for each in rates if floor)
    assert all(each >= floor - rounding for each in rates[warmup:])
    assert all(after <= before + rounding for before, after in pairwise(rates[warmup:]))
    assert all(after >= before for before, after in pairwise(rates[:warmup]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("step", 1.0, 0, 1), "one of constant, linear, cosine, inverse_sqrt, got 'step'"),
        (("linear", 0.0, 0, 1), "rate must be a number above 0, got 0.0"),
        (("linear", math.nan, 0, 1), "got nan"),
        (("linear", "1e-4", 0, 1), "got '1e-4'"),
        (("linear", math.inf, 0, 1), "got inf"),
        (("linear", 1.0, 0, 0), "steps must be a whole number, 1 or more, got 0"),
        (("linear", 1.0, 0, 2.5), "got 2.5"),
        (("linear", 1.0, 4, 3), "warm-up must be a whole number of steps, 0 to 3, got 4"),
        (("linear", 1.0, -1, 3), "got -1"),
        (("linear", 1.0, 0, 3, 1.5), "floor must be from 0 to the rate 1.0, got 1.5"),
        (("linear", 1.0, 0, 3, -0.5), "got -0.5"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, said):
    with pytest.raises(ModelError, match=said):
        Schedule(*arguments)
