"""Few-shot prompts: their text, their length, and where an answer to them ends."""

import dataclasses

import pytest
from small_tokenizers import llama2

import model
from model import ContextError, GPT2Config, LanguageModel, ModelError, Tokenizer, few_shot


@pytest.fixture(scope="module")
def lm():
    return model.load("tiny-gpt2", device="cpu")


def test_instruction_examples_and_question_stand_one_after_the_other(lm):
    prompt = few_shot(lm, "moon", instruction="Name the light.", examples=[("noon", "sun"), ("dusk", "star")])
    assert prompt.text == (
        "Name the light.\n\nInput: noon\nOutput: sun\n\nInput: dusk\nOutput: star\n\nInput: moon\nOutput:"
    )
    assert prompt.stop == "\n\n"
    assert prompt.tokens == len(lm.tokenizer.encode(prompt.text))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Input: q\nOutput:"),
        ({"instruction": "Do."}, "Do.\n\nInput: q\nOutput:"),
        ({"examples": [("a", "b")]}, "Input: a\nOutput: b\n\nInput: q\nOutput:"),
        ({"examples": [["a", "b"]], "separator": "\n---\n"}, "Input: a\nOutput: b\n---\nInput: q\nOutput:"),
        ({"examples": [("", "")]}, "Input: \nOutput: \n\nInput: q\nOutput:"),
        ({"examples": [("a", "b")], "input_label": "Q", "output_label": "A"}, "Q a\nA b\n\nQ q\nA"),
    ],
)
def test_parts_that_are_left_out_leave_no_trace_and_labels_can_be_others(lm, options, text):
    prompt = few_shot(lm, "q", **options)
    assert (prompt.text, prompt.stop) == (text, options.get("separator", "\n\n"))
    assert prompt.tokens == len(lm.tokenizer.encode(text))


def test_an_answer_stops_at_the_separator(lm):
    """The separator is one that the model writes by itself."""
    prompt = few_shot(lm, "And God", examples=[("And God said", "Let there be light.")], separator="\n")
    whole = lm.generate(prompt.text, max_new_tokens=40).text
    assert "\n" in whole
    answer = lm.generate(prompt.text, max_new_tokens=40, stop=prompt.stop)
    assert (answer.text, answer.finish_reason, answer.stop) == (whole.split("\n")[0], "stop", "\n")
    assert answer.prompt_tokens == prompt.tokens


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_with_the_numbers(lm):
    examples = [("question", "answer")] * 3
    tokens, limit = few_shot(lm, "q", examples=examples).tokens, lm.config.n_positions
    assert few_shot(lm, "q", examples=examples, max_new_tokens=limit - tokens).tokens == tokens
    with pytest.raises(ContextError) as caught:
        few_shot(lm, "q", examples=examples, max_new_tokens=limit - tokens + 1)
    assert str(caught.value) == (
        f"the prompt has {tokens} tokens (3 examples) and the answer may have {limit - tokens + 1}, "
        f"but the model has {limit} positions; give fewer or shorter examples"
    )
    lm.generate(few_shot(lm, "q", max_new_tokens=2).text, max_new_tokens=2)  # what is let through fits


@pytest.mark.parametrize("example", [("a",), ("a", "b", "c"), ("a", 1), (None, "b"), [], "ab", 5, None], ids=repr)
def test_an_example_that_is_not_a_pair_is_refused_by_number(lm, example):
    with pytest.raises(ModelError) as caught:
        few_shot(lm, "q", examples=[("a", "b"), example])
    assert str(caught.value) == f"examples[1] must be a pair of an input and an output, got {example!r}"


def test_an_answer_needs_an_end(lm):
    with pytest.raises(ModelError, match="separator must not be empty: it is what ends an answer"):
        few_shot(lm, "q", separator="")


def test_an_answer_needs_room(lm):
    for bad in (0, -1, None, 1.5):
        with pytest.raises(ModelError, match="max_new_tokens must be 1 or more"):
            few_shot(lm, "q", max_new_tokens=bad)


@pytest.mark.parametrize("name", ["query", "instruction", "input_label", "output_label", "separator", "examples"])
def test_what_is_not_text_is_refused(lm, name):
    with pytest.raises(ModelError, match=r"must be (text|a list of pairs), got 5"):
        few_shot(lm, **{"query": "q", name: 5})


def test_a_model_without_tokenizer_is_refused():
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ModelError, match="few_shot needs a tokenizer, and this model has none"):
        few_shot(model.from_config(config, device="cpu"), "q")


def test_the_limit_is_the_models_own(lm):
    short = LanguageModel(dataclasses.replace(lm.config, n_positions=20), lm.parameters, tokenizer=lm.tokenizer)
    tokens = few_shot(lm, "q").tokens
    assert few_shot(short, "q", max_new_tokens=20 - tokens).tokens == tokens
    with pytest.raises(ContextError, match="but the model has 20 positions"):
        few_shot(short, "q", max_new_tokens=21 - tokens)


def test_the_bos_token_counts_where_the_tokenizer_puts_one_before_a_text(lm):
    tokenizer = Tokenizer(llama2())
    other = LanguageModel(lm.config, lm.parameters, tokenizer=tokenizer)
    prompt = few_shot(other, "light")
    ids = other.stream(prompt.text).row.prompt
    assert ids == tokenizer.backend.encode(prompt.text).ids
    assert (ids[0], len(ids)) == (1, prompt.tokens)
