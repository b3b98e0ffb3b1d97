"""Prompts that join and leave while others run: each gives what it would give alone."""

import pytest
import torch

import model
from model import ModelError
from model.decoder import Decoder
from model.errors import OutOfMemoryError

PROMPTS = [
    ("And Moses said unto", {"max_new_tokens": 12}),
    ("In the beginning", {"max_new_tokens": 5, "temperature": 0.9, "seed": 3}),
    ("", {"max_new_tokens": 9, "temperature": 1.2, "top_p": 0.8, "seed": 2**63}),
    ("The LORD is my shepherd", {"max_new_tokens": 1}),
    ("a", {"max_new_tokens": 7, "stop": "e"}),
]


@pytest.fixture(scope="module", params=["cpu", torch.device("cpu")], ids=["numpy", "torch"])
def lm(request):
    return model.load("tiny-gpt2", device=request.param)


@pytest.fixture(scope="module")
def alone(lm):
    return [lm.generate(prompt, **options) for prompt, options in PROMPTS]


def same(result, other):
    assert (result.text, result.tokens, result.finish_reason) == (other.text, other.tokens, other.finish_reason)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_prompts_that_are_added_while_others_run(lm, alone, batch_size):
    texts, order = {}, []
    with lm.batch(batch_size) as batch:
        entries = [batch.add(prompt, **options) for prompt, options in PROMPTS[:2]]
        for entry, piece in batch:
            texts[entry] = texts.get(entry, "") + piece
            order.append(entry)
            assert piece or entry.done
            if len(entries) < len(PROMPTS):
                prompt, options = PROMPTS[len(entries)]
                entries.append(batch.add(prompt, **options))
    for entry, other in zip(entries, alone, strict=True):
        assert entry.done
        same(entry.result, other)
        assert texts[entry] == other.text
    first_end = max(i for i, each in enumerate(order) if each is entries[1])
    assert (entries[0] in order[first_end:]) == (batch_size > 1), "two of them ran together"


def test_what_is_added_after_the_end_is_run_by_iterating_again(lm, alone):
    with lm.batch(2) as batch:
        assert list(batch) == []
        for (prompt, options), other in zip(PROMPTS[:2], alone, strict=False):
            entry = batch.add(prompt, **options)
            assert "".join(piece for _, piece in batch) == other.text
            same(entry.result, other)


def test_one_that_is_cancelled_makes_room(lm, alone):
    with lm.batch(1) as batch:
        first, second, third = (batch.add(prompt, **options) for prompt, options in PROMPTS[:3])
        seen = []
        for entry, _ in batch:
            seen.append(entry)
            if len(seen) == 3:
                first.cancel()
                second.cancel()  # it has not begun
    assert seen[:3] == [first] * 3
    assert set(seen[3:]) == {third}
    assert (first.result.finish_reason, second.result.finish_reason) == ("cancelled", "cancelled")
    assert first.result.tokens == alone[0].tokens[: len(first.result.tokens)]
    assert second.result.tokens == []
    same(third.result, alone[2])
    third.cancel()
    assert third.result.finish_reason == alone[2].finish_reason


def test_a_batch_that_is_left_gives_its_rows_back(lm, alone):
    with lm.batch(2) as batch:
        for prompt, options in PROMPTS[:2]:
            batch.add(prompt, **options)
        next(batch)
    assert batch._decoder.lengths == [0, 0]
    batch.close()
    for call in (lambda: next(batch), lambda: batch.add("a")):
        with pytest.raises(ModelError, match="the batch is closed"):
            call()
    same(lm.generate(PROMPTS[0][0], **PROMPTS[0][1]), alone[0])


def test_an_error_of_the_model_closes_the_batch():
    lm = model.load("tiny-gpt2", device="cpu")
    lm.parameters["norm.weight"] = lm.parameters["norm.weight"] * float("nan")
    with lm.batch(2) as batch:
        batch.add("a")
        with pytest.raises(ModelError, match="not finite"):
            next(batch)
        with pytest.raises(ModelError, match="closed"):
            next(batch)


def test_memory_that_runs_out_is_explained(monkeypatch):
    lm = model.load("tiny-gpt2", device="cpu")

    def fails(*arguments, **options):
        raise MemoryError

    with lm.batch(3) as batch:
        batch.add("a")
        monkeypatch.setattr(Decoder, "start", fails)
        with pytest.raises(OutOfMemoryError, match=r"3 rows of up to 512 tokens ran out .*predicted.*reduce batch"):
            next(batch)
    monkeypatch.setattr(Decoder, "__init__", fails)
    with pytest.raises(OutOfMemoryError, match="ran out of memory"):
        lm.batch(3)


def test_without_graphs_there_is_nothing_to_warm_up(lm):
    assert lm.warm_up(4) == 0.0
    with pytest.raises(ModelError, match="batch_size"):
        lm.warm_up(0)


def test_what_cannot_be_is_refused_when_it_is_added(lm):
    with pytest.raises(ModelError, match="batch_size"):
        lm.batch(0)
    with lm.batch(1) as batch:
        with pytest.raises(ModelError, match="temperature"):
            batch.add("a", temperature=-1)
        with pytest.raises(ModelError, match="one prompt"):
            batch.add(["a", "b"])
        with pytest.raises(TypeError, match="batch_size"):
            batch.add("a", batch_size=2)
        assert list(batch) == []
