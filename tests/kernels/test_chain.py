"""Steps and prompts as a GPU runs them, one kernel beside the next: nobody reads too early, or writes too soon."""

import pytest
import torch
import triton.language as tl
from chain import Touched, chain, faults
from decoding import MISTRAL, lively

import gpukernels
from gpukernels.kernels import few_rows
from gpukernels.kernels.attention import decode
from gpukernels.kernels.device import INTERPRETING, Gpu
from gpukernels.launches import dependent_launches
from model.decoder import Decoder
from model.graph import GraphDecoder
from model.sampling import Sampling

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="the interpreter knows what is touched")

CPU = torch.device("cpu")
DRAWN = Sampling(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture(autouse=True)
def several_splits(monkeypatch):
    """Four shares of a row's keys for each head, of blocks of four keys."""
    monkeypatch.setattr(decode, "_HEAD_TILES", {1024: (4, 4)})
    monkeypatch.setattr(decode, "_GROUP_TILES", {1024: (16, 4)})
    monkeypatch.setattr(decode, "gpu", lambda: Gpu(capability=80, multiprocessors=12))


def replayed(function):
    """As decoding.replayed, but what is replayed are dependent launches, as a graph has them."""
    result = function()

    def replay():
        with dependent_launches():
            result.copy_(function())

    return replay, result


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_rows_start_step_move_and_leave(captured):
    """Eagerly too, with dependent launches throughout: then a prompt of one token is a step's kernels."""
    lm = lively(CPU, "float16", n_embd=32, n_head=2)
    options = {"rows": 3, "capacity": lm.config.n_positions} | ({"capture": replayed} if captured else {})
    decoder = (GraphDecoder if captured else Decoder)(lm.parameters, lm.config, **options)
    with chain() as launches, dependent_launches():
        decoder.start(0, list(range(11)), Sampling())
        decoder.start(1, [5], DRAWN, seed=3, seen=[5])
        for _ in range(2):
            decoder.step(2)
        decoder.move(1, 0)
        decoder.release(1)
        decoder.step(1)
        decoder.start(1, list(range(20)), Sampling())
        decoder.start(2, [7, 8], Sampling())
        decoder.start(0, [7], DRAWN)  # the last row is in use
        decoder.step(3)
    names = {launch.name for launch in launches if launch.dependent}
    assert names == {"_few_rows_kernel", "_decode_head_kernel"}
    assert any(len(launch.waited) < len({*launch.early, *launch.reads}) for launch in launches if launch.dependent)
    assert faults(launches) == []


def test_rows_of_a_mistral_start_and_step():
    """Where positions are turned behind the norm, and a gate stands between two products."""
    lm = lively(CPU, "float16", config=MISTRAL)
    decoder = GraphDecoder(lm.parameters, lm.config, rows=2, capacity=lm.config.n_positions, capture=replayed)
    with chain() as launches, dependent_launches():
        decoder.start(0, list(range(11)), Sampling())
        decoder.start(1, [5], DRAWN, seed=3, seen=[5])
        for _ in range(3):
            decoder.step(2)
    names = {launch.name for launch in launches if launch.dependent}
    assert names == {"_few_rows_kernel", "_rope_kernel", "_decode_group_kernel", "_swiglu_forward_kernel"}
    assert faults(launches) == []


def test_a_product_in_passes_and_heads_that_share_keys(monkeypatch):
    monkeypatch.setattr(few_rows, "_HELD", {8: 100, 16: 100})
    monkeypatch.setattr(few_rows, "_PASS", 512)
    x, weight, residual = torch.randn(11, 700).half(), torch.randn(24, 700).half(), torch.randn(11, 24).half()
    q, k = torch.randn(2, 1, 4, 16).half(), torch.randn(2, 1, 2, 16).half()
    cache, lengths = torch.randn(2, 40, 2, 16).half(), torch.tensor([37, 3], dtype=torch.int32)
    with chain() as launches, dependent_launches():
        gpukernels.linear(x, weight, residual=residual)
        gpukernels.cached_attention(q, k, k, cache, cache.clone(), lengths)
    assert [launch.name for launch in launches if launch.dependent] == ["_few_rows_kernel", "_decode_group_kernel"]
    assert faults(launches) == []


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_by_itself_in_front_of_a_product(norm, monkeypatch):
    """As in front of a head that is too wide for a norm in every program."""
    monkeypatch.setattr(few_rows, "_NORMS", 0)
    x, weight = torch.randn(3, 64).half(), torch.randn(72, 64).half()
    norm_weight, norm_bias = torch.randn(64).half(), torch.randn(64).half()
    with chain() as launches, dependent_launches():
        x = gpukernels.linear(x, weight[:64])
        gpukernels.norm_linear(x, norm_weight, norm_bias if norm == "layer" else None, weight, norm=norm)
    names = ["_few_rows_kernel", "_norm_forward_kernel", "_few_rows_kernel"]
    assert [launch.name for launch in launches if launch.dependent] == names
    assert [bool(launch.hasty) for launch in launches] == [True, False, True]
    assert faults(launches) == []


@pytest.mark.parametrize("norms", [4, 0], ids=["norm in the product", "norm by itself"])
def test_layers_with_rms_norms_rotary_positions_and_swiglu(norms, monkeypatch):
    """LLaMA's: every kernel is a dependent one."""
    monkeypatch.setattr(few_rows, "_NORMS", norms)
    heads, kv_heads, width, inner, rows = 4, 2, 16, 48, 3
    C = heads * width
    x, norm = torch.randn(rows, 1, C).half(), torch.randn(C).half()
    shapes = [((heads + 2 * kv_heads) * width, C), (C, C), (2 * inner, C), (C, inner)]
    qkv_weight, projection, gate_up_weight, down = (torch.randn(shape).half() / 8 for shape in shapes)
    caches = torch.randn(2, 2, rows, kv_heads, 40, width).half().transpose(3, 4)
    lengths = torch.tensor([37, 3, 0], dtype=torch.int32)
    positions, arrivals = (lengths - 1)[:, None], torch.zeros((rows, heads), dtype=torch.int32)
    gpukernels.rope(torch.randn(1, 1, 1, width), positions[:1])  # makes the frequencies
    with chain() as launches, dependent_launches():
        for keys, values in caches:
            qkv = gpukernels.norm_linear(x, norm, None, qkv_weight, norm="rms").view(rows, 1, -1, width)
            turned = gpukernels.rope(qkv[:, :, : heads + kv_heads], positions)
            q, k, v = turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, heads + kv_heads :]
            y = gpukernels.cached_attention(q, k, v, keys, values, lengths, arrivals=arrivals)
            x = gpukernels.linear(y.view(rows, 1, C), projection, residual=x)
            gate_up = gpukernels.norm_linear(x, norm, None, gate_up_weight, norm="rms")
            x = gpukernels.linear(gpukernels.swiglu(*gate_up.chunk(2, -1)), down, residual=x)
    few, before = "_few_rows_kernel", [] if norms else ["_norm_forward_kernel"]
    layer = [*before, few, "_rope_kernel", "_decode_group_kernel", few, *before, few, "_swiglu_forward_kernel", few]
    assert [launch.name for launch in launches] == 2 * layer
    assert all(launch.dependent for launch in launches)
    assert faults(launches) == []


def test_what_is_read_too_early_is_found():
    """Lengths that are written right in front of attention, and a chain in which nobody waits."""
    q, cache, lengths = torch.randn(1, 1, 2, 16), torch.randn(1, 40, 2, 16), torch.tensor([36], dtype=torch.int32)
    with chain() as launches, dependent_launches():
        lengths += 1
        gpukernels.cached_attention(q, q, q, cache, cache.clone(), lengths)
    assert faults(launches) == ["_decode_head_kernel reads before its wait what aten::add_.Tensor writes"]
    with chain() as launches, dependent_launches():
        tl.extra.cuda.gdc_wait = lambda _semantic=None: None
        gpukernels.cached_attention(q, q, q, cache, cache.clone(), lengths)
    name = "_decode_head_kernel"
    assert faults(launches) == [
        f"{name} never waits: the next one starts beside what came before",
        f"{name} writes before it has waited",
    ]


def test_programs_that_touch_the_same_are_found():
    launch = Touched("kernel")
    launch.writes[(0,)].append(torch.arange(4).numpy())
    launch.reads[(1,)].append(torch.arange(4, 8).numpy())
    assert faults([launch]) == []
    launch.reads[(1,)].append(torch.arange(3, 4).numpy())
    assert faults([launch]) == ["programs of kernel touch what another one writes"]


def test_what_changes_and_is_read_early_through_a_cache_is_found():
    before, between, launch = Touched("before"), Touched("between"), Touched("kernel", dependent=True)
    before.writes[(0,)].append(torch.arange(4).numpy())
    launch.early[(0,)].append(torch.arange(4).numpy())
    launch.waited.add((0,))
    assert faults([before, between, launch]) == []
    launch.cached[(0,)].append(torch.arange(1).numpy())
    assert faults([before, between, launch]) == [
        "kernel reads before its wait, perhaps old lines of a cache, what changes"
    ]


def test_what_may_still_run_goes_back_to_a_kernel_that_waited_before_it_let_the_next_start():
    writer, launch = Touched("writer"), Touched("kernel", dependent=True)
    late, hasty = Touched("late", dependent=True), Touched("hasty", dependent=True)
    writer.writes[(0,)].append(torch.arange(4).numpy())
    launch.early[(0,)].append(torch.arange(4).numpy())
    hasty.hasty.add((0,))
    for each in (late, hasty, launch):
        each.waited.add((0,))
    assert faults([writer, late, hasty, launch]) == []
    assert faults([late, writer, hasty, hasty, launch]) == ["kernel reads before its wait what writer writes"]
