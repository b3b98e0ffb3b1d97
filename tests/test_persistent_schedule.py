"""The order of a persistent step's stages: what is right about it, and that each kind of mistake is found."""

import pytest

from gpukernels.kernels.persistent.schedule import GIVEN, ScheduleError, Stage, check, decode_schedule

KINDS = ("QKV", "attention", "projection", "up", "down", "norm", "head", "sample")
RESULTS = {**{f"key {i}": f"attention {i}" for i in range(3)}, "x": "sample", "tokens": "sample", "lengths": "sample"}


def stages():
    return decode_schedule(3, dict.fromkeys(KINDS, 2))


def verify(found, results=RESULTS):
    given = {name for stage in stages() for name, wanted in stage.reads.items() if wanted == GIVEN}
    check(found, given=given, results=results)


def test_a_step_of_gpt2():
    found = stages()
    verify(found)
    assert len(found) == 5 * 3 + 3
    assert sum(stage.barrier for stage in found) == len(found) - 1
    assert [stage.name for stage in found[5:10]] == ["QKV 1", "attention 1", "projection 1", "up 1", "down 1"]


def changed(name, **fields):
    """The schedule with one stage otherwise."""
    return [stage._replace(**fields) if stage.name == name else stage for stage in stages()]


def named(name):
    return next(stage for stage in stages() if stage.name == name)


def without(name):
    return [stage for stage in stages() if stage.name != name]


def swapped(first, second):
    order = {first: named(second), second: named(first)}
    return [order.get(stage.name, stage) for stage in stages()]


def reads(name, **more):
    return {**named(name).reads, **{key.replace("_", " "): wanted for key, wanted in more.items()}}


#: By what is wrong: a schedule, and what is said of it.
BROKEN = {
    "a stage is missing": (without("up 1"), "down 1 reads up of up 1, but up 0 has written it since"),
    "the first writer is missing": (without("QKV 0"), "attention 0 reads qkv of QKV 0, which does not write it before"),
    "stages in another order": (swapped("projection 0", "up 0"), "up 0 reads middle of projection 0, which does not"),
    "a barrier is missing": (
        changed("up 1", barrier=False),
        "projection 1 writes middle, which up 1 uses at the same time",
    ),
    "loaded before the barrier": (
        changed("projection 2", early=("weights 2", "attended")),
        "projection 2 loads attended before the barrier behind attention 2",
    ),
    "a buffer is used again too early": (
        changed("up 0", writes=("up", "middle")),
        "up 0 writes middle, which other tiles of it may still read",
    ),
    "a buffer is not alive any more": (
        changed("QKV 1", writes=("qkv", "hidden"), reads={"weights 1": GIVEN}),
        "projection 1 reads hidden of down 0, but QKV 1 has written it since",
    ),
    "written while another stage reads it": (
        [*stages()[:-3], Stage("more", 1, {}, ("hidden",), barrier=False), *stages()[-3:]],
        "down 2 writes hidden, which more uses at the same time",
    ),
    "written beside a reader": (
        changed("sample", barrier=False, reads={"table": GIVEN}, own=(), writes=("x", "tokens", "normed", "lengths")),
        "sample writes normed, which head uses at the same time",
    ),
    "nobody has written it": (changed("head", reads=reads("head", other=GIVEN)), "head reads other, which nobody"),
    "not a tile": (changed("norm", tiles=0), "norm has 0 tiles"),
    "early without a read": (changed("norm", early=("logits",)), "norm says how it reads something"),
    "a result is missing": (changed("sample", writes=("x", "lengths")), "tokens is not sample's in the end"),
    "two of a name": ([*stages(), named("norm")], "two stages have the name norm"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_mistakes_are_found(what):
    found, said = BROKEN[what]
    with pytest.raises(ScheduleError, match=said):
        verify(found)
