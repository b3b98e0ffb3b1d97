"""Generation: what comes out is a matter of prompt, settings and seed alone, and ends where it should.

Two kinds of models: the bundled one, and scripted ones that say given tokens whatever they read.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from choice import choose, uniform

import model
from model import GPT2Config, LanguageModel, ModelError, TokenizerError
from model.sampling import Sampling

PROMPT = "And Moses said unto"
GREEDY = [259, 492, 269, 432, 12, 1414, 361, 289, 259, 498, 269, 734, 12, 268, 1473, 259, 492, 269, 432, 12]
PROMPTS = [PROMPT, "", "In the beginning", "a", "The LORD is my shepherd; I shall not want. 🙂"]


@pytest.fixture(scope="module")
def lm():
    return model.load("tiny-gpt2", device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """For torch: products this small gain nothing from a second one, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blank(*, vocabulary=4096, positions=64, tokenizer=None, eos=()) -> LanguageModel:
    """A model whose parameters are all 0, with a head of its own."""
    sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 64, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None)
    parameters = model.from_config(config, device="cpu").parameters
    for array in parameters.values():
        array[...] = 0
    return LanguageModel(config, parameters, tokenizer=tokenizer, eos_token_ids=eos)


def scripted(script, **options) -> LanguageModel:
    """Says script[i] behind position i, whatever stands there: positions are unit vectors, and the row of
    a token in the head is the sum of those that it follows."""
    said = blank(**options)
    said.parameters["norm.weight"][:] = 1
    said.parameters["positions.weight"][:] = np.eye(said.config.n_positions, 64)
    for position, token in enumerate(script):
        said.parameters["head.weight"][token, position] += 1
    return said


def constant(logits: dict[int, float], **options) -> LanguageModel:
    """Has the same logits everywhere: those given, and 0."""
    same = blank(**options)
    same.parameters["norm.bias"][0] = 1
    for token, value in logits.items():
        same.parameters["head.weight"][token, 0] = value
    return same


def tiny(positions=8, vocabulary=97, tokenizer=None, device="cpu") -> LanguageModel:
    """Random weights, wide enough that what was said counts."""
    sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)
    parameters = model.from_config(config, seed=1, device=device).parameters
    for array in parameters.values():
        array *= 10 if array.ndim == 2 else 1
    return LanguageModel(config, parameters, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def babbler(lm):
    """A small model of random weights with the bundled model's tokenizer."""
    return tiny(64, 4096, lm.tokenizer)


def known(results):
    """What does not depend on the clock."""
    if not isinstance(results, list):
        results = [results]
    return [
        {name: value for name, value in dataclasses.asdict(result).items() if "per_second" not in name}
        for result in results
    ]


def said(results):
    """And not on how the seeds were given."""
    return [(each["text"], each["tokens"], each["finish_reason"], each["stop"]) for each in known(results)]


@pytest.mark.parametrize(("device", "count"), [("cpu", 20), (torch.device("cpu"), 10)], ids=["numpy", "torch"])
def test_greedy_golden_tokens(device, count):
    lm = model.load("tiny-gpt2", device=device)
    result = lm.generate(PROMPT, max_new_tokens=count)
    assert result.tokens == GREEDY[:count]
    assert result.text == lm.tokenizer.decode(GREEDY[:count])
    assert result.text.startswith(" the children of Israel, Go up to the land")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_greedy_tokens_are_the_best_of_the_whole_sequences_logits(dtype):
    lm = model.load("tiny-gpt2", device="cpu", dtype=dtype)
    ids = lm.tokenizer.encode(PROMPT)
    tokens = lm.generate(PROMPT, max_new_tokens=12).tokens
    assert lm.logits(ids + tokens)[0, len(ids) - 1 : -1].argmax(-1).tolist() == tokens


OPTIONS = [
    {},
    {"temperature": 1.0, "seed": [5, 2**64 - 1, 0, 5, 6, 7]},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": range(6)},
    {"repetition_penalty": 1.5},
]


def check_batches(lm, prompts, batch_sizes, options):
    seeds = options.get("seed", [None] * len(prompts))
    alone = [lm.generate(prompt, **options | {"seed": seed}) for prompt, seed in zip(prompts, seeds, strict=True)]
    for batch_size in batch_sizes:
        together = lm.generate(prompts, batch_size=batch_size, **options)
        assert said(together) == said(alone)
        assert [each.prompt_tokens for each in together] == [each.prompt_tokens for each in alone]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_of_any_size_gives_what_each_prompt_gives_alone(options):
    lm = tiny(positions=40)
    lm.eos_token_ids = range(12)  # so that rows end at different times
    prompts = [[first, *range(30, 30 + length)] for first, length in enumerate((0, 16, 3, 1, 8, 5))]
    check_batches(lm, prompts, (1, 2, 3, 4, 6, 99), options | {"max_new_tokens": 20})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": range(5)}, {"stop": [" the", ","]}], ids=str)
def test_a_batch_of_the_bundled_model_gives_what_each_prompt_gives_alone(lm, options):
    check_batches(lm, PROMPTS, (3,), options | {"max_new_tokens": 6})


@pytest.mark.parametrize("options", [OPTIONS[0] | {"seed": 0}, *OPTIONS[1:3]], ids=str)
def test_torch_gives_what_numpy_gives(options):
    prompts = [[1, 2, 3], [4], [5] * 9, [6], [7, 8], [9] * 4]
    want = known(tiny(positions=40).generate(prompts, max_new_tokens=12, **options))
    lm = tiny(positions=40, device=torch.device("cpu"))
    assert known(lm.generate(prompts, max_new_tokens=12, batch_size=4, **options)) == want


def test_rows_that_end_at_different_times_make_room_for_the_next():
    """Row i says 1 to 9 from where its prompt ends, and ends at 9."""
    lm = scripted(range(1, 10), eos=(9,))
    prompts = [[0] * length for length in (3, 1, 8, 2, 9, 5)]
    for batch_size in (1, 2, 3, 6):
        results = lm.generate(prompts, max_new_tokens=20, batch_size=batch_size)
        assert [each.tokens for each in results] == [list(range(len(prompt), 10)) for prompt in prompts]


def test_a_seed_fixes_the_result_and_rows_have_their_own_streams(babbler):
    options = {"max_new_tokens": 5, "temperature": 1.0}
    rows = babbler.generate([PROMPT] * 4, seed=11, **options)
    assert known(babbler.generate([PROMPT] * 4, seed=11, batch_size=2, **options)) == known(rows)
    assert [(each.seed, each.stream) for each in rows] == [(11, row) for row in range(4)]
    assert len({tuple(each.tokens) for each in rows}) == 4
    assert known(babbler.generate(PROMPT, seed=11, **options)) == known(rows[0])
    assert said(babbler.generate(PROMPT, seed=12, **options)) != said(rows[0])
    listed = babbler.generate([PROMPT] * 3, seed=(11, 11, 12), **options)
    assert [(each.seed, each.stream) for each in listed] == [(11, 0), (11, 0), (12, 0)]
    assert listed[0].tokens == listed[1].tokens == rows[0].tokens
    drawn = babbler.generate(PROMPT, **options)
    assert known(babbler.generate(PROMPT, seed=drawn.seed, **options)) == known(drawn)
    assert drawn.seed != babbler.generate(PROMPT, **options).seed


def test_the_draws_are_those_of_the_seed_and_row(babbler):
    """Token i of a row is chosen at uniform(seed, stream, i) from the logits behind all that came before."""
    sampling = Sampling(temperature=1.2, top_p=0.95)
    row = babbler.generate([PROMPT, PROMPT], max_new_tokens=5, temperature=1.2, top_p=0.95, seed=3)[1]
    ids = babbler.tokenizer.encode(PROMPT)
    for step, token in enumerate(row.tokens):
        assert choose(babbler.logits(ids)[0, -1], sampling, uniform(3, 1, step)) == token
        ids.append(token)


def test_n_samples_come_prompt_by_prompt(babbler):
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1}
    rows = babbler.generate(["a", PROMPT], n=2, **options)
    assert known(rows) == known(babbler.generate(["a", "a", PROMPT, PROMPT], **options))
    assert known(babbler.generate("a", n=2, **options)) == known(rows[:2])
    assert isinstance(babbler.generate("a", n=1, **options), model.Generation)
    assert [each.seed for each in babbler.generate(["a"], n=2, **options | {"seed": [8, 9]})] == [8, 9]


def test_temperature_zero_does_not_depend_on_the_seed(babbler):
    results = [babbler.generate(PROMPT, max_new_tokens=9, temperature=0, seed=seed) for seed in (0, 1, None)]
    assert results[0].tokens == results[1].tokens == results[2].tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "seed": 4, "top_k": 200},
        {"repetition_penalty": 1.3, "max_new_tokens": None, "overflow": "truncate_left"},
    ],
    ids=str,
)
def test_a_stream_joins_to_the_text_of_generate(babbler, options):
    options = {"max_new_tokens": 12, **options}
    for prompt in (PROMPT, babbler.tokenizer.encode(PROMPT), np.array(babbler.tokenizer.encode(PROMPT))):
        stream = babbler.stream(prompt, **options)
        pieces = list(stream)
        want = babbler.generate(prompt, **options | {"seed": stream.result.seed})
        assert "".join(pieces) == want.text
        assert all(pieces)
        assert known(stream.result) == known(want)
        assert next(stream, None) is None


def test_the_result_of_a_stream_that_still_runs_is_what_there_is_so_far(lm):
    stream = lm.stream(PROMPT, max_new_tokens=4)
    assert next(stream) == lm.tokenizer.decode(GREEDY[:1])
    soon = stream.result
    assert (soon.text, soon.tokens, soon.finish_reason) == (lm.tokenizer.decode(GREEDY[:1]), GREEDY[:1], None)
    assert list(stream) == [lm.tokenizer.decode([token]) for token in GREEDY[1:4]]
    assert (stream.result.tokens, stream.result.finish_reason) == (GREEDY[:4], "length")
    assert soon.tokens == GREEDY[:1], "what was given out does not change afterwards"


def test_what_a_generation_says_besides_its_text(lm):
    result = lm.generate(PROMPT, max_new_tokens=5, seed=9, stop="xyz")
    fields = {"text", "tokens", "finish_reason", "stop", "prompt_tokens", "seed", "stream"}
    assert known(result)[0].keys() == fields
    assert (result.finish_reason, result.stop, result.prompt_tokens, result.seed) == ("length", None, 4, 9)
    assert result.prompt_tokens_per_second > 0
    assert result.generation_tokens_per_second > 0
    single = lm.generate(PROMPT, max_new_tokens=1)
    assert single.prompt_tokens_per_second > 0
    assert single.generation_tokens_per_second == 0, "no token came after the prompt's own"
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = ""


def test_prompts_of_every_kind(babbler):
    ids = babbler.tokenizer.encode(PROMPT)
    want = babbler.generate(PROMPT, max_new_tokens=3).tokens
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), torch.tensor(ids)):
        assert babbler.generate(prompt, max_new_tokens=3).tokens == want
    several = [[PROMPT] * 2, (PROMPT, PROMPT), [ids, tuple(ids)], [np.array(ids)] * 2, np.array([ids] * 2)]
    for prompts in (*several, torch.tensor([ids] * 2)):
        assert [each.tokens for each in babbler.generate(prompts, max_new_tokens=3)] == [want] * 2
    assert babbler.generate([PROMPT], max_new_tokens=3)[0].tokens == want
    assert babbler.generate([]) == []


def test_an_empty_prompt_starts_from_the_bos_token(babbler):
    options = {"max_new_tokens": 4, "seed": 0}
    assert known(babbler.generate("", **options)) == known(babbler.generate([0], **options))
    config = dataclasses.replace(babbler.config, bos_token_id=None)
    without = LanguageModel(config, babbler.parameters, tokenizer=babbler.tokenizer)
    with pytest.raises(ModelError, match="the prompt is empty, and the model has no bos token"):
        without.generate("")


def test_a_repetition_penalty_falls_on_the_prompt_and_on_what_was_said():
    lm, logits = constant({1: 8.0, 2: 6.0, 3: 5.0, 4: -1.0}, vocabulary=5), [0, 8, 6, 5, -1]
    for prompt, penalty in (([0], 1.5), ([0, 1], 1.5), ([4, 2], 3.0), ([1, 2, 3], 100.0), ([0], 0.5)):
        seen, want = set(prompt), []
        for _ in range(6):
            after = [(z / penalty if z > 0 else z * penalty) if id in seen else z for id, z in enumerate(logits)]
            want.append(after.index(max(after)))
            seen.add(want[-1])
        assert lm.generate(prompt, max_new_tokens=6, repetition_penalty=penalty).tokens == want


def test_padding_of_the_vocabulary_is_never_chosen(lm):
    """Ids beyond the tokenizer have the largest logits, and may even stand in the prompt."""
    size = lm.tokenizer.size
    padded = constant({3: 5.0, **dict.fromkeys(range(size, size + 64), 9.0)}, vocabulary=size + 64)
    assert padded.generate([0], max_new_tokens=1).tokens == [size]
    padded = LanguageModel(padded.config, padded.parameters, tokenizer=lm.tokenizer, eos_token_ids=())
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 100.0, "top_k": 5000, "seed": 2}):
        for prompt in ([0], [size + 1, 0]):
            result = padded.generate([prompt] * 4, max_new_tokens=8, repetition_penalty=1.1, **options)
            assert max(token for row in result for token in row.tokens) < size
    assert padded.generate([0], max_new_tokens=2).tokens == [3, 3]


def test_a_model_without_tokenizer_takes_and_gives_ids():
    lm = tiny()
    result = lm.generate([1, 2], max_new_tokens=3, stop=None)
    assert (result.text, len(result.tokens), result.finish_reason) == ("", 3, "length")
    for what, call in {
        "text": lambda: lm.generate("a"),
        "stop": lambda: lm.generate([1], stop="a"),
    }.items():
        with pytest.raises(TokenizerError) as caught:
            call()
        assert str(caught.value) == f"{what} needs a tokenizer, and this model has none: prompts can be token ids"
    with pytest.raises(TokenizerError, match="needs a tokenizer"):
        lm.stream([1, 2], max_new_tokens=1)


def test_logits_that_are_not_finite_are_an_error():
    lm = tiny()
    lm.parameters["norm.weight"] = np.full_like(lm.parameters["norm.weight"], np.nan)
    for temperature in (0, 1):
        with pytest.raises(ModelError, match="logits are not finite"):
            lm.generate([1, 2], max_new_tokens=2, temperature=temperature)


@pytest.fixture
def computing_nothing(monkeypatch):
    """Whatever would allocate a cache fails."""

    def computed(*arguments, **options):
        raise AssertionError("this was computed")

    monkeypatch.setattr(model.language_model, "Decoder", computed)


WRONG = [
    *[({"max_new_tokens": bad}, "max_new_tokens must be 1 or more, or None, got") for bad in (0, -1, 1.5, "3", True)],
    *[({"n": bad}, "n must be 1 or more, got") for bad in (0, None, 2.0, True)],
    *[({"batch_size": bad}, "batch_size must be 1 or more, got") for bad in (0, -1, 2.5, None, True)],
    ({"overflow": "wrap"}, "overflow must be one of error, truncate_left, slide, got 'wrap'"),
    ({"overflow": "slide", "max_new_tokens": None}, 'overflow="slide" never ends by itself: give max_new_tokens'),
    *[({"stop": bad}, "stop must be a string or several, none of them empty") for bad in ("", ["a", ""], [1], b"a", 5)],
    *[({"seed": bad}, r"seed must be a whole number, or a list of 1") for bad in (1.5, "1", [], [1, 2], True)],
    *[
        ({"seed": bad}, r"a seed must be a whole number from 0 to 2\*\*64 - 1")
        for bad in (-1, 2**64, [-1], [1.5], [None])
    ],
    ({"temperature": -1}, "temperature must be a number, 0 or more, got -1"),
    ({"top_k": 1.5}, "top_k must be a whole number, 0 or more, or None, got 1.5"),
    ({"top_p": 2}, "top_p must be a number from 0 to 1, or None, got 2"),
    ({"min_p": -1}, "min_p must be a number from 0 to 1, or None, got -1"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
    *[({"prompt": bad}, "token ids must be") for bad in ([-1], [4096], [1.5], [True], [1, [2]], ["a", [1]])],
    *[
        ({"prompt": bad}, "prompt must be text, token ids, or several of either, got " + re.escape(repr(bad)))
        for bad in (None, b"a", 3, 2.5, {"a": 1}, {1})
    ],
    *[
        ({"prompt": bad}, f"token ids must be integers, got {stray}$")
        for bad, stray in (
            ([1, True], "True"),
            ([[1, 2], [3, False]], "False"),
            ([1, np.True_], "np.True_"),
            ([1, 2.0], "2.0"),
            (["a", 1], "'a'"),
            ([1, "2"], "'2'"),
            ([[1], "a"], "'a'"),
            ([1, None], "None"),
            ([np.array([1]), np.array([True])], "bool"),
            ([np.array([1]), np.array([1.0])], "float64"),
        )
    ],
    *[({"prompt": bad}, "a prompt must have one token id or more in one row") for bad in ([[]], [[1], [[2]]])],
]


@pytest.mark.usefixtures("computing_nothing")
@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_an_argument_that_cannot_be_is_refused_by_name(lm, options, message):
    options = {"prompt": PROMPT, **options}
    with pytest.raises(ModelError, match=message):
        lm.generate(**options)
    if not {"n", "batch_size"} & options.keys() and options["prompt"] is PROMPT:
        with pytest.raises(ModelError, match=message):
            lm.stream(**options)  # before a piece is asked for


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numpy_numbers_are_numbers(lm, kind):
    assert lm.stream([kind(1), 2]).row.prompt == [1, 2]
    sizes = dict.fromkeys(("max_new_tokens", "n", "batch_size", "top_k"), 2)
    prompts, options = [[1, 2]] * 3, {"temperature": 1, "overflow": "truncate_left", "seed": [1, 2**63, 3, 4, 5, 6]}
    want = [each.tokens for each in lm.generate(prompts, **options, **sizes)]
    options |= {"temperature": np.float32(1), "seed": list(np.array(options["seed"], np.uint64))}
    found = lm.generate(prompts, **options, **{name: kind(size) for name, size in sizes.items()})
    assert [each.tokens for each in found] == want
    assert [type(each.seed) for each in found] == [int] * 6


@pytest.mark.usefixtures("computing_nothing")
def test_a_stream_takes_one_prompt(lm):
    for prompts in ([PROMPT], [[1], [2]], []):
        with pytest.raises(ModelError, match="stream takes one prompt; use generate for several"):
            lm.stream(prompts)
