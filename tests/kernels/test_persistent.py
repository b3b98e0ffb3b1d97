"""The persistent step, interpreted as one program: the eager step's tokens, and its schedule kept to the letter."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoding import CONFIG, decoder_of, generated, lively, replayed
from together import together

import model
from bench.cuda_providers import OursPersistent, random_model
from gpukernels.kernels.attention import decode
from gpukernels.kernels.device import INTERPRETING, Gpu
from gpukernels.persistent import why_not
from model.decoder import Decoder
from model.device import TorchDevice
from model.gpt2 import slots
from model.parameters import Parameters
from model.persistent import PersistentDecoder, graph_decoder
from model.sampling import DRAWING, FILTERS, PENALTY, Sampling

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="one program is the whole grid under the interpreter alone")

CPU = torch.device("cpu")
SMALL = {"n_embd": 32, "n_head": 2}


@pytest.fixture
def several_splits(monkeypatch):
    """Four shares of a row's keys for each head, of blocks of four keys."""
    monkeypatch.setattr(decode, "_HEAD_TILES", {1024: (4, 4)})
    monkeypatch.setattr(decode, "gpu", lambda: Gpu(capability=80, multiprocessors=12))


class Uncaptured(PersistentDecoder):
    """What is captured and replayed elsewhere is called here, which costs half the time."""

    prefill, step = Decoder.prefill, Decoder.step


def persistent(lm, rows):
    options = {"rows": rows, "capacity": lm.config.n_positions}
    return Uncaptured(lm.parameters, lm.config, **options, capture=replayed)


OPTIONS = (Sampling(), Sampling(), Sampling(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2))


def in_use(*decoders, options=OPTIONS):
    """The same sequences of 19, 0 and 6 tokens in each: random keys and values, and a random token next."""
    source = decoders[0]
    for array in (source.cache.keys, source.cache.values, source._x):
        array.normal_()
    for decoder in decoders:
        for name in ("keys", "values"):
            getattr(decoder.cache, name).copy_(getattr(source.cache, name))
        decoder._x.copy_(source._x)
        for row, length in enumerate((19, 0, 6)):
            decoder.lengths[row] = decoder.cache.lengths[row] = length
            decoder.sampling.set(row, options[row], seed=7, stream=row, step=1, seen=[row, 9])
    return source.sampling.needed(0, 3)


def check_state(found, wanted, *, atol=0.0):
    """The cache, and the next step's tokens as they are embedded; atol: of keys and values."""
    assert torch.equal(found._x[[0, 2]], wanted._x[[0, 2]])
    for name in ("keys", "values", "lengths", "arrivals"):
        torch.testing.assert_close(getattr(found.cache, name), getattr(wanted.cache, name), rtol=0, atol=atol)


# Alone: greedily. Ragged: one greedy, one drawn, and the longer one ends alone.
@pytest.mark.parametrize(("slots", "only"), [(1, [6]), (2, [6, 5])], ids=["alone", "ragged"])
def test_tokens_are_those_of_numpy(slots, only, several_splits):
    wanted = generated(decoder_of(lively("cpu", **SMALL), rows=1), slots=1, only=only)
    assert generated(persistent(lively(CPU, **SMALL), slots), slots=slots, only=only) == wanted


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_step_is_the_eager_step(dtype, several_splits):
    """Three rows, one of which is not in use."""
    lm = lively(CPU, dtype, **SMALL)
    eager, ours = decoder_of(lm, rows=3), persistent(lm, 3)
    names = in_use(eager, ours)
    logits = eager._logits(3, eager.capacity)
    wanted = eager._choose(logits, 0, 3, names)
    assert ours._step(3, ours.capacity, names).tolist() == wanted.tolist()
    # NumPy adds up in another order where tiles have another width, and so does the last norm.
    rounding = {"float16": 2.0**-9, "float32": 2.0**-20}[dtype]
    atol = rounding * float(logits.abs().max())
    torch.testing.assert_close(ours.step_logits(3)[[0, 2]], logits[[0, 2]], rtol=0, atol=atol)
    check_state(ours, eager, atol=rounding * float(eager.cache.keys.abs().max()))


# Of 6 tiles of QKV one program has a second one, of 4 of the projection one has none, and of 36 of attention's all have
# seven or eight.
PROGRAMS = 5


def test_programs_that_run_together_give_the_same_bits_in_any_order(several_splits, monkeypatch):
    lm = lively(CPU, **SMALL)
    alone = persistent(lm, 3)
    monkeypatch.setattr("gpukernels.kernels.persistent.step._programs", lambda: PROGRAMS)
    many = [persistent(lm, 3) for _ in range(2)]
    drawn = Sampling(temperature=0.9)
    names, tokens = in_use(alone, *many, options=(drawn, drawn, Sampling())), []
    for seed, decoder in enumerate(many):
        with together("_persistent_step_kernel", PROGRAMS, seed):
            tokens.append([decoder._step(3, decoder.capacity, names).tolist() for _ in range(2)])  # the counter goes on
    assert tokens[0] == tokens[1] == [alone._step(3, alone.capacity, names).tolist() for _ in range(2)]
    check_state(many[0], many[1])
    # One program has wider tiles, whose sums NumPy makes in another order.
    check_state(many[0], alone, atol=1e-4)


def test_more_rows_than_it_is_made_for_step_as_ever():
    lm = model.from_config(dataclasses.replace(CONFIG, n_layer=1, n_positions=4, **SMALL), seed=3, device=CPU)
    decoder = persistent(lm, 65)
    decoder._persistent = None
    for row in range(65):
        decoder.lengths[row] = 1
    assert len(decoder.step(65)()) == 65


class Touched:
    """What each stage loads before its barrier and behind it, and what it stores, by address."""

    def __init__(self, counter):
        self._counter = counter.data_ptr()
        self.stages = [{}]
        self._kind = None  # until a launch knows what its counter showed

    def add(self, kind, pointers, mask):
        pointed, wanted = np.broadcast_arrays(pointers.data, mask.data)
        kind = self._kind if kind == "reads" else kind
        self.stages[-1].setdefault(kind, []).append(np.unique(pointed[wanted.astype(bool)]))

    def count(self, pointer, value):
        """At the barrier's counter: a program arrives, or polls."""
        if pointer == self._counter and value == 1:
            self.stages.append({})
            self._kind = "early"
        elif pointer == self._counter:
            self._kind = "early" if self._kind is None else "reads"


@pytest.fixture
def touched(monkeypatch):
    """Starts writing down what is touched; call it with the barrier's counter."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store, atomic = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw

    def start(counter):
        found = Touched(counter)

        def counted_load(self, pointers, mask, *rest, **options):
            found.add("reads", pointers, mask)
            return load(self, pointers, mask, *rest, **options)

        def counted_store(self, pointers, value, mask, *rest, **options):
            found.add("writes", pointers, mask)
            return store(self, pointers, value, mask, *rest, **options)

        def counted_atomic(self, op, pointers, value, *rest, **options):
            found.count(int(pointers.data.flat[0]), int(value.data.flat[0]))
            return atomic(self, op, pointers, value, *rest, **options)

        monkeypatch.setattr(Builder, "create_masked_load", counted_load)
        monkeypatch.setattr(Builder, "create_masked_store", counted_store)
        monkeypatch.setattr(Builder, "create_atomic_rmw", counted_atomic)
        return found

    return start


def test_every_stage_touches_what_the_schedule_says_and_nothing_else(touched, several_splits):
    decoder = persistent(lively(CPU, **SMALL), 3)
    in_use(decoder)
    step, names = decoder._persistent, (*DRAWING, *FILTERS, *PENALTY)
    arrays = decoder.sampling.arrays(names, 0, 3)
    counters = [arrays.pop("step"), arrays.pop("seen")]
    memory = {**step.memory, "sampling": list(arrays.values()), "counters": counters}
    found = touched(step._counter)
    decoder._step(3, decoder.capacity, names)

    def last(x):  # the rows of `seen` have room behind them
        return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) * x.element_size()

    spans = [(name, x.data_ptr(), x.data_ptr() + last(x)) for name, group in memory.items() for x in group]
    assert len(found.stages) == len(step.schedule)
    for stage, kinds in zip(step.schedule, found.stages, strict=True):
        said = {"early": set(stage.early), "reads": set(stage.reads), "writes": set(stage.writes)}
        seen = {kind: set() for kind in said}
        for kind, groups in kinds.items():
            addresses = np.unique(np.concatenate(groups))
            for name, first, last in spans:
                inside = (addresses >= first) & (addresses <= last)
                written = name.replace("keys", "key") if kind == "writes" else name
                if inside.any() and written in said[kind]:
                    seen[kind].add(written)
                    addresses = addresses[~inside]
            assert not addresses.size, f"{stage.name}: {kind} of something that the schedule does not name"
        # All of it is needed, early or behind the barrier. (Of a tied head's memory only one name is.)
        assert seen["writes"] == said["writes"]
        assert seen["early"] | seen["reads"] == said["reads"], stage.name
        assert seen["early"] == said["early"], stage.name


def test_what_a_model_must_be():
    blocks = lively(CPU).parameters.blocks
    assert why_not(blocks, heads=3) is None
    elsewhere = [{name: x.clone() for name, x in block.items()} for block in blocks]
    assert "do not lie at one distance" in why_not(elsewhere, heads=3)
    assert "do not lie at one distance" in why_not([*blocks, blocks[1]], heads=3)
    wide = without_data(n_embd=1600)
    assert "a row of qkv's weight has 6400 bytes, and 3328 fit" in why_not(wide.parameters.blocks, heads=25)
    assert "its heads are 320 wide" in why_not(without_data(n_embd=320).parameters.blocks, heads=1)
    with pytest.raises(ValueError, match="cannot be made of this model: its heads are 320 wide"):
        persistent(without_data(n_embd=320), 1)


def without_data(**changed):
    """A model of one head."""
    config = dataclasses.replace(CONFIG, n_head=1, **changed)
    return SimpleNamespace(config=config, parameters=Parameters(slots(config), TorchDevice("meta"), "float32"))


def test_the_benchmark_compares_it_with_the_eager_step_first(monkeypatch):
    lm = random_model(dataclasses.replace(CONFIG, n_layer=1, **SMALL), CPU, "float16")
    ours = OursPersistent(lm, capture=replayed)
    prompts = [[1, 2, 3]]
    assert ours.step_error(prompts, steps=2) < 2e-3
    monkeypatch.setattr(OursPersistent, "step_error", lambda self, prompts: float("nan"))
    with pytest.raises(RuntimeError, match="from the eager step's"):
        ours(prompts, 2)


def test_it_is_used_where_it_was_measured_and_nowhere_else(monkeypatch):
    lm = lively(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert graph_decoder(lm.parameters, lm.config).__name__ == "GraphDecoder"
    monkeypatch.setattr("model.persistent.FASTER", {"A GPU": "measured"})
    assert graph_decoder(lm.parameters, lm.config) is PersistentDecoder
    monkeypatch.setattr("model.persistent.FASTER", {"Another": "measured"})
    assert graph_decoder(lm.parameters, lm.config).__name__ == "GraphDecoder"
