"""A decode step as it is launched: how many kernels, which ones, and what they compile to."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.jit import JITFunction

from bench import cost_card
from gpukernels import cached_attention, decode_attention, rms_norm, rope, swiglu
from gpukernels.compile_report import CHIPS, record
from gpukernels.compile_report.cost import cost
from gpukernels.compile_report.recording import _CallLaunchers, stand_in
from gpukernels.kernels.few_rows import few_rows
from gpukernels.launches import dependent_launches
from gpukernels.library.registry import LAUNCHERS
from model.decoder import Decoder
from model.device import TorchDevice
from model.gpt2 import slots
from model.gpt2_config import PRESETS, GPT2Config
from model.graph import GraphDecoder
from model.parameters import Parameters
from model.sampling import DRAWING, FILTERS, PENALTY, Sampling

SPILL = 16


def step(preset: str, dtype: str, *, rows: int = 1, names=()):
    """A step of a preset as a graph of it is captured, on tensors without data."""
    decoder = decoder_of(preset, dtype, rows=rows)
    with dependent_launches():
        decoder._step(rows, decoder.capacity, names)


def decoder_of(preset: str | GPT2Config, dtype: str, *, rows: int) -> Decoder:
    config = PRESETS[preset] if isinstance(preset, str) else preset
    parameters = Parameters(slots(config), TorchDevice(torch.device("meta")), dtype)
    decoder = Decoder(parameters, config, rows=rows, capacity=config.n_positions)
    decoder.sampling._arrays["seen"] = torch.empty((rows, config.vocab_size), dtype=torch.bool, device="meta")
    return decoder


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_five_launches_a_layer_and_three_beside(monkeypatch, preset, dtype, rows):
    names = []
    # What is launched, and nothing is compiled for it.
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *arguments, **options: names.append(kernel.fn.__name__))
    with stand_in(90), _CallLaunchers():
        step(preset, dtype, rows=rows)
    layers = PRESETS[preset].n_layer
    few, attention = "_few_rows_kernel", "_decode_head_kernel"
    assert names == [few, attention, few, few, few] * layers + ["_norm_forward_kernel", few, "_sample_kernel"]


class Seen(TorchDispatchMode):
    """The names of torch's own ops, those inside the launchers too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gpukernels":
            with self:
                return LAUNCHERS[op._schema.name.removeprefix("gpukernels::")](*args)
        self.names.add(op.name().partition(".")[0])
        return op(*args, **(kwargs or {}))


# Of a float32 array to float32: nothing.
VIEWS = {"select", "slice", "unbind", "view", "reshape", "transpose", "unsqueeze", "alias", "numpy_T", "empty", "to"}


@pytest.mark.parametrize("what", ["a step", "a prompt"])
def test_nothing_but_kernels_of_ours_is_launched(what):
    """So nothing stands between dependent kernels, and a graph holds what `record` shows."""
    config = PRESETS["gpt2"]
    decoder = decoder_of("gpt2", "float16", rows=4)
    prompt = torch.empty((2, 128), dtype=torch.int32, device="meta")
    with stand_in(90) as launches, Seen() as seen:
        if what == "a step":
            decoder._step(4, config.n_positions, (*DRAWING, *FILTERS, *PENALTY))
        else:
            decoder._read(0, prompt[:1], prompt[1:], config.n_positions)
    assert len(launches) >= 5 * config.n_layer
    assert {name.removeprefix("aten::") for name in seen.names} <= VIEWS


def test_after_a_warm_up_no_row_and_no_setting_compiles_a_kernel(monkeypatch):
    """Compiling takes a second: a row that joins, wherever it does and whatever it asks for, must not wait for it."""
    config = GPT2Config(vocab_size=1001, n_positions=64, n_embd=64, n_layer=1, n_head=1)
    place = TorchDevice("meta")
    monkeypatch.setattr(place, "fetch", lambda tokens: None)
    parameters = Parameters(slots(config), place, "float16")
    decoder = GraphDecoder(parameters, config, rows=6, capacity=64, capture=lambda step: (lambda: None, step()))
    wanted = set()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, key, **rest: wanted.add((fn.name, key)) or True)
    with stand_in(90), _CallLaunchers():
        decoder.warm_up()
        warm = set(wanted)
        for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.0, top_k=4, top_p=0.5)):
            for row in (5, *range(5)):  # the last one is in use while the others start
                decoder.start(row, [1] * (3 + 9 * row), sampling)
            for row in reversed(range(6)):
                decoder.step(row + 1)
                decoder.release(row)
    assert wanted == warm
    assert {name.rpartition(".")[2] for name, _ in warm} >= {"_sample_kernel", "_append_kernel", "_few_rows_kernel"}


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl"])
def test_a_step_moves_the_weights_and_the_cache_and_little_else(preset, rows):
    """By what `cost` says of each launch, which tests/kernels/test_step_traffic.py holds against the loads."""
    config = PRESETS[preset]
    launches = record(lambda: step(preset, "float16", rows=rows), capability=90)
    least = cost_card.step(config, "float16", batch=rows, context=config.n_positions).moved
    assert least <= sum(cost(launch).moved for launch in launches) <= 1.05 * least


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("preset", "dtype"), [("gpt2", "float16"), ("gpt2", "float32"), ("gpt2-xl", "float16")])
def test_no_kernel_of_a_step_spills(preset, dtype, capability):
    launches = record(lambda: step(preset, dtype, rows=8, names=(*DRAWING, *FILTERS)), capability=capability)
    for launch in {launch.compiled.cubin: launch for launch in launches}.values():
        compiled = launch.compiled
        assert compiled.spilled_bytes <= SPILL, f"{launch.kernel} spills {compiled.spilled_bytes} bytes"
        assert compiled.shared_memory <= CHIPS[capability].shared_memory
        assert any(".128" in name for name in compiled.instructions), f"{launch.kernel} loads nothing 16 bytes wide"


@pytest.mark.parametrize("capability", [90, 100])
def test_old_keys_and_values_are_loaded_before_the_wait(capability):
    launches = record(lambda: step("gpt2", "float16"), capability=capability)
    launch = next(each for each in launches if each.kernel == "_decode_head_kernel")
    listing = launch.compiled.listing
    (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
    early = [name for name in listing[:wait] if name.startswith(("LDG", "STG", "ATOM"))]
    # The length; 64 keys and as many values of 128 bytes, 16 of them for each of 128 threads. All past the L1 cache.
    assert early == ["LDG.E.STRONG.GPU"] + ["LDG.E.128.STRONG.GPU"] * 8
    assert trigger < listing.index("LDG.E.STRONG.GPU")


@pytest.mark.parametrize("capability", [90, 100])
def test_swiglu_and_rope_let_the_next_kernel_start_and_wait(capability):
    packed = torch.empty((8, 1, 2 * 5632), dtype=torch.float16, device="meta")
    qk = torch.empty((8, 1, 40, 64), dtype=torch.float16, device="meta")[:, :, :36]
    positions = torch.empty((8, 1), dtype=torch.int32, device="meta")
    with dependent_launches():
        launches = record(lambda: (swiglu(*packed.chunk(2, -1)), rope(qk, positions)), capability=capability)
    assert [launch.kernel for launch in launches] == ["_swiglu_forward_kernel", "_rope_kernel"]
    for launch in launches:
        listing = launch.compiled.listing
        (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
        assert trigger < wait < min(i for i, name in enumerate(listing) if name.startswith("LDG"))


def dependent(**strides: int) -> dict[str, bool]:
    """By kernel, whether it is a dependent one; strides: those of neighbours, where they are more than 1."""

    def meta(name, *shape, dtype=torch.float16):
        return torch.empty((*shape, strides.get(name, 1)), dtype=dtype, device="meta")[..., 0]

    x, weight, norm_weight, bias = meta("x", 2, 768), meta("weight", 768, 768), meta("norm", 768), meta("bias", 768)
    q, keys, lengths = meta("q", 2, 12, 64), meta("keys", 2, 1024, 12, 64), meta("lengths", 2, dtype=torch.int32)

    def launch():
        few_rows(x, weight, bias, norm=(norm_weight, None, 1e-5, True))
        rms_norm(x, norm_weight)
        decode_attention(q, keys, keys, lengths)

    with dependent_launches():
        return {each.kernel: each.arguments["DEPENDENT"] for each in record(launch, capability=90)}


PRODUCT, NORM, ATTENTION = "_few_rows_kernel", "_norm_forward_kernel", "_decode_head_kernel"


def test_a_kernel_waits_for_the_copy_of_what_it_loads_early(monkeypatch):
    """By an ordinary launch: programs of the copy that have ended let a dependent kernel start, and not see it."""
    every = dict.fromkeys((PRODUCT, NORM, ATTENTION), True)
    assert dependent() == every
    assert dependent(x=2, weight=2, q=2) == every  # not loaded early, or not copied
    assert dependent(norm=2) == every | {PRODUCT: False, NORM: False}
    assert dependent(bias=2) == every | {PRODUCT: False}
    assert dependent(keys=2) == dependent(lengths=2) == every | {ATTENTION: False}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # which casts weights
    assert dependent() == dict.fromkeys(every, False)


@pytest.mark.parametrize("vocabulary", [27, 50257])
@pytest.mark.parametrize("names", [(), DRAWING], ids=["greedy", "drawn"])
def test_what_a_row_counts_is_read_by_all_threads_before_one_writes_it(names, vocabulary):
    """Between the loads of a row's length and step and their stores there is a barrier: no late warp reads the new.

    A sum of up to 32 logits is none: every warp makes it by itself.
    """
    decoder = decoder_of(dataclasses.replace(PRESETS["gpt2"], vocab_size=vocabulary), "float16", rows=1)
    logits = torch.empty((1, vocabulary), dtype=torch.float16, device="meta")
    (launch,) = record(lambda: decoder._choose(logits, 0, 1, names), capability=90)
    listing = launch.compiled.listing
    counted = [i for i, name in enumerate(listing) if name == "STG.E"]
    barrier = max(i for i, name in enumerate(listing[: counted[0]]) if name.startswith("BAR"))
    assert len(counted) == 1 + bool(names)
    assert listing[barrier:].count("LDG.E") == 0  # nothing of 4 bytes is loaded behind the barrier


@pytest.mark.parametrize("heads", [8, 2], ids=["own keys", "shared keys"])
def test_the_last_program_of_a_head_sees_what_the_others_have_stored(heads):
    """All threads have stored before one counts; that is a release and an acquire of the whole GPU, and all know it."""
    arrays = {"dtype": torch.float16, "device": "meta"}
    q, new = torch.empty((1, 1, 8, 64), **arrays), torch.empty((1, 1, heads, 64), **arrays)
    cache, lengths = torch.empty((1, 1024, heads, 64), **arrays), torch.empty(1, dtype=torch.int32, device="meta")
    (launch,) = record(lambda: cached_attention(q, new, new, cache, cache, lengths), capability=90)
    kinds = ("STG", "LDG", "BAR", "MEMBAR", "ATOM", "CCTL")
    listing = [name for name in launch.compiled.listing if name.startswith(kinds) and not name.startswith("LDGSTS")]
    (count,) = (i for i, name in enumerate(listing) if name.startswith("ATOM"))
    barrier = "BAR.SYNC.DEFER_BLOCKING"
    assert listing[count - 2 : count + 3] == [
        barrier,
        "MEMBAR.ALL.GPU",
        "ATOMG.E.ADD.STRONG.GPU",
        "CCTL.IVALL",
        barrier,
    ]
    assert listing[count - 3].startswith("STG"), "of the partials"
    behind = [name for name in listing[count + 3 :] if not name.startswith("BAR")]
    assert behind[0] == "STG.E", "the counter is at 0 again"
    assert all(name.endswith("STRONG.GPU") for name in behind[1:-1])
    assert behind[-1].startswith("STG"), "of the result"


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl"])
def test_every_dependent_kernel_waits_before_it_stores_and_behind_a_norm_lets_the_next_one_start(preset):
    launches = record(lambda: step(preset, "float16"), capability=90)
    waiting = {launch.compiled.cubin: launch for launch in launches if launch.arguments.get("DEPENDENT")}
    assert len(waiting) == 5 + 2  # those of a layer, the last norm, and the head
    late = []
    for launch in waiting.values():
        listing = launch.compiled.listing
        (wait,), (trigger,) = ([i for i, name in enumerate(listing) if name == each] for each in ("ACQBULK", "PREEXIT"))
        assert not any(name.startswith(("STG", "ATOM", "RED")) for name in listing[:wait]), launch.kernel
        late += [launch.kernel] * (trigger > wait)
    # QKV, up, and the norm in front of the head: what stands between two of them may run at once.
    assert late == ["_few_rows_kernel", "_few_rows_kernel", "_norm_forward_kernel"]
