"""Decoders: rows that join and leave, steps that run ahead, and steps that are replayed."""

import numpy as np
import pytest
import torch
from choice import choose, uniform
from decoding import CONFIG, REQUESTS, check_a_row_that_is_not_finite, decoder_of, generated, lively
from torch.utils._python_dispatch import TorchDispatchMode

from model.decoder import Decoder
from model.device import TorchDevice
from model.gpt2 import slots
from model.graph import GraphDecoder, _variant, can_capture
from model.parameters import Parameters
from model.sampling import DRAWING, FILTERS, PENALTY, Sampling, SamplingState

devices = pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["numpy", "torch"])


@pytest.fixture(scope="module")
def expected():
    """Each request alone, from the whole text's logits: no cache, no decoder."""
    lm, results = lively("cpu"), []
    for stream, (prompt, new, sampling) in enumerate(REQUESTS):
        ids, tokens = list(prompt), []
        for step in range(new):
            tokens.append(choose(lm.logits(ids)[0, -1], sampling, uniform(11, stream, step), ids))
            ids.append(tokens[-1])
        results.append(tokens)
    return results


@devices
@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_rows_join_and_leave(expected, device, slots, captured, ahead):
    decoder = decoder_of(lively(device), rows=slots, captured=captured, ahead=ahead)
    assert generated(decoder, slots=slots) == expected
    assert generated(decoder, slots=slots) == expected, "and again"


@devices
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("slots", [1, 3, 4, 7])
def test_a_prompt_is_computed_once_for_neighbours_that_join_together(expected, device, slots, captured, monkeypatch):
    decoder, prompts = decoder_of(lively(device), rows=slots, captured=captured), []
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda row, ids: prompts.append(ids) or prefill(row, ids))
    only = [2, 2, 2, 5, 5, 2, 4]
    assert generated(decoder, slots=slots, only=only) == [expected[each] for each in only]
    assert len(prompts) == {1: 7, 3: 4, 4: 5, 7: 4}[slots]


@devices
def test_samples_of_a_prompt_are_those_that_are_drawn_one_at_a_time(device):
    options = {"n": 5, "seed": 4, "temperature": 1.0, "repetition_penalty": 1.3, "max_new_tokens": 6}
    together, alone = (
        [answer.tokens for answer in lively(device).generate([3, 1, 4, 1, 5], **options, batch_size=size)]
        for size in (5, 1)
    )
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1


@devices
@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_a_row_that_ends_by_itself(expected, device, ahead):
    eos = {tokens[len(tokens) // 2] for tokens in expected}
    cut = [tokens[: 1 + next((i for i, each in enumerate(tokens) if each in eos), 99)] for tokens in expected]
    decoder = decoder_of(lively(device), rows=3, captured=True, ahead=ahead)
    assert generated(decoder, slots=3, eos=frozenset(eos)) == cut


@devices
def test_a_context_that_slides_while_steps_run_ahead(device):
    short = {"n_positions": 12}
    results = [
        generated(
            decoder_of(lively(device), rows=2, captured=captured, ahead=captured, **short), slots=2, overflow="slide"
        )
        for captured in (False, True)
    ]
    assert results[0] == results[1]
    assert [len(tokens) for tokens in results[0]] == [new for _, new, _ in REQUESTS]


def test_a_graph_is_captured_once_for_rows_and_arguments():
    decoder = decoder_of(lively("cpu"), rows=6, captured=True)
    assert decoder.buckets == [1, 2, 4, 6]
    generated(decoder, slots=6)
    first = dict(decoder._graphs)
    assert {bucket for bucket, _ in first} <= {*decoder.buckets, "prompt"}
    generated(decoder, slots=6)
    assert decoder._graphs == first, "another length is no other graph"
    assert decoder.capture_seconds > 0
    decoder.warm_up()
    drawing = (*DRAWING, *FILTERS)
    assert {(bucket, names) for bucket in (1, 2, 4, 6) for names in ((), drawing)} <= decoder._graphs.keys()
    assert {size for kind, size in decoder._graphs if kind == "prompt"} == {16, 32, 40}


def test_capturing_changes_nothing_of_rows_in_use():
    lm = lively("cpu")
    decoders = [decoder_of(lm, rows=2, captured=True) for _ in range(2)]
    for decoder in decoders:
        decoder.start(0, [1, 2, 3], Sampling())
        decoder.start(1, [4], Sampling())
    decoders[1].warm_up()
    for step in range(4):
        assert decoders[0].step(2)() == decoders[1].step(2)(), step
    for name in ("keys", "values", "lengths"):
        np.testing.assert_array_equal(*(getattr(decoder.cache, name) for decoder in decoders))


@devices
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
def test_a_row_that_is_not_finite_says_so_and_leaves_its_neighbours_alone(device, captured):
    check_a_row_that_is_not_finite(lively(device), captured=captured)


def test_arguments_of_few_kinds():
    assert _variant(()) == ()
    assert _variant(("temperature", "top_k")) == _variant(DRAWING) == (*DRAWING, *FILTERS)
    assert _variant(PENALTY) == PENALTY
    assert _variant((*DRAWING, *PENALTY)) == (*DRAWING, *FILTERS, *PENALTY)


class Transfers(TorchDispatchMode):
    """The copies from the host: on a GPU each of them, but from pinned memory, waits for all that was started."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        source = args[-1] if op.name() in ("aten::copy_", "aten::_to_copy") else None
        # A number that is assigned to one element travels as a tensor of the host; into a slice it is filled.
        if source is not None and (source.device.type == "cpu" or args[0].ndim == 0):
            self.shapes.append(tuple(source.shape))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "replayed"])
def test_nothing_but_a_prompt_is_copied_from_the_host(monkeypatch, captured):
    place = TorchDevice("meta")
    monkeypatch.setattr(place, "fetch", lambda tokens: None)
    options = {"rows": 3, "capacity": CONFIG.n_positions}
    if captured:
        options["capture"] = lambda function: (lambda: None, function())
    decoder = (GraphDecoder if captured else Decoder)(Parameters(slots(CONFIG), place, "float16"), CONFIG, **options)
    if captured:
        decoder.warm_up()
    sampling = Sampling(temperature=0.8, top_k=9)
    with Transfers() as transfers:
        decoder.start(2, [1, 2, 3], sampling, seed=1)
        assert transfers.shapes == ([(2, 16)] if captured else [(1, 3)] * 2)
        decoder.step(3)
        decoder.release(2)
        assert len(transfers.shapes) == 2 - captured


def test_only_cuda_has_graphs():
    for device in ("cpu", torch.device("cpu"), torch.device("meta")):
        assert not can_capture(lively("cpu").parameters if device == "cpu" else _parameters(device), CONFIG)


def _parameters(device):
    class Parameters:
        pass

    Parameters.device = type("Device", (), {"name": str(device)})
    return Parameters


@devices
def test_the_state_of_a_row_is_that_of_its_request_alone(device):
    lm = lively(device)
    state = SamplingState(lm.parameters.device, 2, 61)
    state.set(0, Sampling(temperature=1e-300, top_k=10**12, repetition_penalty=1e300), seed=2**64 - 1, stream=3, step=4)
    arrays = {name: each.tolist() for name, each in state.arrays((*DRAWING, *FILTERS, *PENALTY), 0, 2).items()}
    seen = arrays.pop("seen")
    assert arrays == {
        "temperature": [2.0**-126, 0],
        "top_k": [61, 0],
        "top_p": [1, 0],
        "min_p": [0, 0],
        "repetition_penalty": [2.0**126, 0],
        "seed": [-1, 0],
        "stream": [3, 0],
        "step": [4, 0],
    }
    assert not any(map(any, seen))
    state.set(0, Sampling(repetition_penalty=2.0), seed=0, stream=0, step=0, seen=[1, 60])
    state.move(0, 1)
    state.set(0, Sampling(repetition_penalty=2.0), seed=0, stream=0, step=0, seen=[5])
    seen = state.arrays(["seen"], 0, 2)["seen"]
    assert [[i for i, each in enumerate(row) if each] for row in seen.tolist()] == [[5], [1, 60]]
    assert state.needed(0, 2) == PENALTY
