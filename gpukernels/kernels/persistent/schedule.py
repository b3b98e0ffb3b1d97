"""The order of a decode step's stages: what each reads, who wrote it, and that nothing comes too early or too late.

Programs of a persistent kernel take the tiles of a stage in turn, and meet at a barrier in front of the next one.
Nothing else orders them: while one is still in a stage, another may already be behind it, at the next barrier, where
it loads what the next stage reads `early`. `check` proves of a schedule that this does no harm.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

GIVEN = "given"  # written before the launch


class Stage(NamedTuple):
    """One kernel of a step, as it were."""

    name: str
    tiles: int  # dealt to the programs in turn
    reads: Mapping[str, str]  # by buffer, the stage whose result is wanted there, or GIVEN
    writes: tuple[str, ...]
    early: tuple[str, ...] = ()  # of those read: loaded before the barrier in front is passed
    own: tuple[str, ...] = ()  # read and written: by the same tile, or ordered by a counter inside the stage
    barrier: bool = True  # in front; the first stage needs none


class ScheduleError(ValueError):
    """A schedule by which a stage might read something else than it should."""


def decode_schedule(layers: int, tiles: Mapping[str, int]) -> list[Stage]:
    """The stages of a GPT-2 step.

    Args:
        tiles: of each kind of stage: "QKV", "attention", "projection", "up", "down", "norm", "head", "sample".

    Buffers: "x", embedded tokens; "hidden", behind a block; "middle", behind its attention; "partials", what the
    splits of attention leave for their last one; "keys i" and "weights i", of a layer; "key i", the newest of
    layer i's keys and values, which is written where "keys i" end.
    """
    stages, x, source = [], "x", GIVEN
    for i in range(layers):
        weights = f"weights {i}"
        qkv, attention, projection, up, down = (
            f"{kind} {i}" for kind in ("QKV", "attention", "projection", "up", "down")
        )
        constant = {weights: GIVEN}
        stages += [
            Stage(qkv, tiles["QKV"], {**constant, x: source}, ("qkv",), (weights,)),
            Stage(
                attention,
                tiles["attention"],
                {f"keys {i}": GIVEN, "lengths": GIVEN, "scales": GIVEN, "qkv": qkv, "partials": GIVEN},
                ("attended", f"key {i}", "partials"),
                (f"keys {i}", "lengths", "scales"),
                ("partials",),
            ),
            Stage(
                projection,
                tiles["projection"],
                {**constant, "attended": attention, x: source},
                ("middle",),
                (weights,),
            ),
            Stage(up, tiles["up"], {**constant, "middle": projection}, ("up",), (weights,)),
            Stage(down, tiles["down"], {**constant, "up": up, "middle": projection}, ("hidden",), (weights,)),
        ]
        if i:  # the counters are at 0 again, and what else is in it is not read
            stages[-4] = stages[-4]._replace(reads={**stages[-4].reads, "partials": f"attention {i - 1}"})
        x, source = "hidden", down
    choosing = {"table": GIVEN, "lengths": GIVEN, "sampling": GIVEN, "counters": GIVEN}
    counted = ("lengths", "counters")
    stages += [
        Stage("norm", tiles["norm"], {"norm": GIVEN, x: source}, ("normed",)),
        Stage("head", tiles["head"], {"head": GIVEN, "normed": "norm"}, ("logits",), ("head",)),
        Stage("sample", tiles["sample"], {**choosing, "logits": "head"}, ("x", "tokens", *counted), own=counted),
    ]
    stages[0] = stages[0]._replace(barrier=False)
    return stages


def check(stages: Sequence[Stage], *, given: Collection[str], results: Mapping[str, str]) -> None:
    """Raises ScheduleError where a stage may not find what it reads, or what a step is to leave is not there.

    Args:
        given: the buffers that have been written before the launch.
        results: by buffer, the stage whose result is there in the end.

    Of every read it holds, then, that the last stage which writes the buffer in front of the reader is the wanted
    one, that a barrier stands between the two (before the loads, so two of them if they are early), and that no
    stage which writes the buffer runs at the same time.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ScheduleError(f"two stages have the name {next(name for name in names if names.count(name) > 1)}")
    epochs = [sum(stage.barrier for stage in stages[1 : i + 1]) for i in range(len(stages))]
    for i, stage in enumerate(stages):
        if stage.tiles < 1:
            raise ScheduleError(f"{stage.name} has {stage.tiles} tiles")
        if not {*stage.early, *stage.own} <= stage.reads.keys():
            raise ScheduleError(f"{stage.name} says how it reads something that it does not read")
        for buffer, wanted in stage.reads.items():
            _check_read(stages, epochs, i, buffer, wanted, given)
        for buffer in stage.writes:
            _check_write(stages, epochs, i, buffer)
    for buffer, wanted in results.items():
        found = _last_writer(stages, len(stages), buffer)
        if found is None or names[found] != wanted:
            raise ScheduleError(f"{buffer} is not {wanted}'s in the end")


def _last_writer(stages: Sequence[Stage], before: int, buffer: str) -> int | None:
    return next((j for j in reversed(range(before)) if buffer in stages[j].writes), None)


def _check_read(
    stages: Sequence[Stage], epochs: Sequence[int], i: int, buffer: str, wanted: str, given: Collection[str]
) -> None:
    stage, j = stages[i], _last_writer(stages, i, buffer)
    if j is None:
        if wanted != GIVEN:
            raise ScheduleError(f"{stage.name} reads {buffer} of {wanted}, which does not write it before")
        if buffer not in given:
            raise ScheduleError(f"{stage.name} reads {buffer}, which nobody has written")
        return
    if stages[j].name != wanted:
        raise ScheduleError(f"{stage.name} reads {buffer} of {wanted}, but {stages[j].name} has written it since")
    # That a barrier stands between the two, `_check_write` sees.
    if buffer in stage.early and epochs[j] == epochs[i] - 1:
        raise ScheduleError(f"{stage.name} loads {buffer} before the barrier behind {wanted}, which writes it")


def _check_write(stages: Sequence[Stage], epochs: Sequence[int], i: int, buffer: str) -> None:
    stage = stages[i]
    if buffer in stage.reads and buffer not in stage.own:
        raise ScheduleError(f"{stage.name} writes {buffer}, which other tiles of it may still read")
    for j, other in enumerate(stages):
        if j != i and epochs[j] == epochs[i] and (buffer in other.reads or buffer in other.writes):
            raise ScheduleError(f"{stage.name} writes {buffer}, which {other.name} uses at the same time")
