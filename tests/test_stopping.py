"""Where a text ends: stop strings against a search of the whole text, eos, lengths, and the end of the context."""

import dataclasses
import itertools

import pytest
from choice import choose, uniform
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import llama2
from test_generate import known, scripted, tiny

import model
from model import ContextError, LanguageModel, Tokenizer
from model.load import locate
from model.sampling import Sampling
from model.stopping import StopMatcher

TOKENIZER = Tokenizer.from_folder(locate("tiny-gpt2"))
END = 0  # <|endoftext|>


def first_complete(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the stop begins that is complete first, and which it is: the shortest prefix of the text that
    ends in one; of several that end there the longest, which began first."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    """The pieces that are passed on, and the stop that was met: as a generation asks."""
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.hit is not None:
            return shown, matcher.hit
    return [*shown, matcher.flush()], None


# Two letters and short stops: overlaps, repetitions and stops inside stops are the rule.
pieces_of = st.lists(st.text("ab", max_size=5), max_size=10)
stops_of = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@settings(max_examples=500, deadline=None)
@given(pieces=pieces_of, stops=stops_of)
@example(pieces=["aab", "aac"], stops=["aabaac"])
@example(pieces=["aaab"], stops=["aab"])
@example(pieces=["a", "b", "a"], stops=["abab", "b"])
@example(pieces=["abab"], stops=["abab", "ba"])
def test_what_is_passed_on_is_the_text_up_to_the_stop_that_is_complete_first(pieces, stops):
    shown, hit = run(pieces, stops)
    text = "".join(pieces)
    truth = first_complete(text, stops)
    if truth is None:
        assert (hit, "".join(shown)) == (None, text)
    else:
        assert (hit, "".join(shown)) == (truth[1], text[: truth[0]])


@settings(max_examples=300, deadline=None)
@given(pieces=pieces_of, stops=stops_of)
def test_nothing_that_could_still_become_a_stop_is_passed_on(pieces, stops):
    """However the text goes on: after each piece, no end of what was seen that begins a stop is out."""
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.hit is not None:
            return
        held = seen[len(shown) :]
        assert seen == shown + held
        beginnings = [size for stop in stops for size in range(1, len(stop) + 1) if seen.endswith(stop[:size])]
        # And no more is held back than must be.
        assert len(held) == max(beginnings, default=0)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=25), stops=stops_of, cuts=st.sets(st.integers(0, 25)))
def test_the_cuts_change_neither_the_text_nor_the_stop(text, stops, cuts):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(places)]
    results = [run(each, stops) for each in (pieces, [text], list(text))]
    joined = {("".join(shown), hit) for shown, hit in results}
    assert len(joined) == 1


@pytest.mark.parametrize(
    ("text", "stops", "shown", "hit"),
    [
        ("one. two.", ["."], "one", "."),
        ("no stop here", ["STOP"], "no stop here", None),
        ("a STO", ["STOP"], "a STO", None),
        ("any text", [], "any text", None),
        ("Question: x\nAnswer", ["\nAns", "\nAnswer"], "Question: x", "\nAns"),
        ("aaaa", ["aaa", "aa"], "", "aa"),
        ("é🙂日本", ["🙂日"], "é", "🙂日"),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_some_texts_in_one_piece_and_by_character(text, stops, shown, hit):
    for pieces in ([text], list(text)):
        got, met = run(pieces, stops)
        assert ("".join(got), met) == (shown, hit)


def test_without_stops_every_piece_passes_at_once():
    matcher = StopMatcher([])
    assert [matcher.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert matcher.flush() == ""
    assert matcher.hit is None


SAID = "In the beginning God created 🙂 the heaven. END of it, and so on"
IDS = TOKENIZER.encode(SAID)


def speaker(script=IDS, eos=()) -> LanguageModel:
    return scripted(script, tokenizer=TOKENIZER, eos=eos)


@pytest.mark.parametrize(
    "stops",
    [
        "END",
        "d creat",  # from the middle of one token to the middle of another
        "🙂",
        "I",
        ["heaven.", "aven", "END"],
        [" END of", "END", "."],
        ["absent", "beginning God"],
        ["END?", "of i"],
        [" so on"],
        "absent",
        ["In the beginning God created 🙂 the heaven. END of it, and so on"],
        [],
    ],
    ids=str,
)
def test_a_stop_string_cuts_the_text_and_the_tokens_end_with_its_last_one(stops):
    """The bundled tokenizer cuts these words up: most of the stops span tokens."""
    truth = first_complete(SAID, [stops] if isinstance(stops, str) else stops)
    result = speaker().generate([5], max_new_tokens=len(IDS), stop=stops)
    pieces = list(stream := speaker().stream([5], max_new_tokens=len(IDS), stop=stops, seed=result.seed))
    assert known(stream.result) == known(result)
    assert "".join(pieces) == result.text
    if truth is None:
        assert (result.text, result.tokens, result.finish_reason, result.stop) == (SAID, IDS, "length", None)
        return
    start, stop = truth
    assert (result.text, result.finish_reason, result.stop) == (SAID[:start], "stop", stop)
    count = next(count for count in range(len(IDS) + 1) if stop in TOKENIZER.decode(IDS[:count]))
    assert result.tokens == IDS[:count]


def test_a_stop_string_in_the_prompt_or_across_its_end_is_not_one():
    prompt = TOKENIZER.encode("THE END")
    result = speaker([0] * (len(prompt) - 1) + IDS).generate(prompt, max_new_tokens=4, stop=["END", "ENDIn"])
    assert (result.tokens, result.stop) == (IDS[:4], None)


def test_an_eos_token_ends_the_text_and_is_not_in_it():
    script = [*IDS[:5], END, *IDS[5:]]
    result = speaker(script, eos=(END,)).generate([5], max_new_tokens=None)
    assert (result.tokens, result.finish_reason, result.stop) == (script[:6], "eos", None)
    assert result.text == TOKENIZER.decode(IDS[:5])
    # Any id can be one; what it stands for is no part of the text, and completes no stop string.
    result = speaker(eos=(9, IDS[3])).generate([5], max_new_tokens=9, stop=TOKENIZER.decode(IDS[3:4]))
    assert (result.tokens, result.finish_reason, result.text) == (IDS[:4], "eos", TOKENIZER.decode(IDS[:3]))
    # Without eos the same tokens are tokens like others, and a special one has no text.
    result = speaker(script).generate([5], max_new_tokens=len(script))
    assert (result.tokens, result.text, result.finish_reason) == (script, SAID, "length")


def test_the_bundled_model_has_the_eos_token_of_its_files():
    assert model.load("tiny-gpt2", device="cpu").eos_token_ids == (END,)


@pytest.mark.parametrize(("eos", "reason"), [((END,), "eos"), ((), "length")])
def test_what_was_held_back_comes_at_the_end(eos, reason):
    """The beginning of a stop string, and bytes that never became a character."""
    face = TOKENIZER.encode("🙂")
    assert len(face) == 4, "every byte of it is a token"
    script = [*TOKENIZER.encode("and EN"), *face[:2], END]
    options = {"max_new_tokens": len(script) - (not eos), "stop": "EN\ufffdD"}
    result = speaker(script, eos=eos).generate([5], **options)
    assert (result.text, result.finish_reason) == ("and EN\ufffd", reason)
    assert "".join(speaker(script, eos=eos).stream([5], **options)) == result.text


def test_the_reason_why_a_text_ends():
    def reason(**options):
        return speaker(eos=(IDS[-1],)).generate([5], **options).finish_reason

    assert reason(max_new_tokens=3) == "length"
    assert reason(max_new_tokens=len(IDS)) == "eos", "eos comes before length"
    assert reason(max_new_tokens=1, stop="I") == "stop", "and a stop string too"
    assert reason(max_new_tokens=None) == "eos"
    assert speaker().generate([5], max_new_tokens=None).finish_reason == "context"


def test_what_does_not_fit_is_an_error_that_names_the_numbers(monkeypatch):
    monkeypatch.setattr(model.language_model, "Decoder", None)  # nothing is computed
    lm = tiny()
    with pytest.raises(ContextError) as caught:
        lm.generate([[1], [1, 2, 3]], max_new_tokens=6)
    assert str(caught.value) == (
        "the prompt has 3 tokens and 6 new ones are to follow, but the model has 8 positions; "
        'shorten one of them, or use overflow="truncate_left" or "slide"'
    )
    with pytest.raises(ContextError, match="the prompt has 8 tokens and 1 new ones are to follow"):
        lm.generate([0] * 8, max_new_tokens=None)
    with pytest.raises(ContextError, match="max_new_tokens=8 leaves no room for a prompt in the 8 positions"):
        lm.generate([1], max_new_tokens=8, overflow="truncate_left")
    config = dataclasses.replace(lm.config, n_positions=1)
    with pytest.raises(ContextError, match='overflow="slide" needs a model with 2 positions or more'):
        LanguageModel(config, lm.parameters).generate([1], overflow="slide")


def test_what_fits_exactly_is_generated():
    lm = tiny()
    whole = lm.generate([5, 6, 7], max_new_tokens=5)
    assert (len(whole.tokens), whole.finish_reason) == (5, "length")
    rest = lm.generate([5, 6, 7], max_new_tokens=None)
    assert (rest.tokens, rest.finish_reason) == (whole.tokens, "context")
    assert lm.generate([0] * 7, max_new_tokens=None).finish_reason == "context"


def test_truncate_left_forgets_the_beginning_of_the_prompt():
    lm, prompt = tiny(), list(range(20))
    for new in (1, 3, 7):
        result = lm.generate(prompt, max_new_tokens=new, overflow="truncate_left")
        assert known(result) == known(lm.generate(prompt[-(8 - new) :], max_new_tokens=new, seed=result.seed))
        assert result.prompt_tokens == 8 - new
    # Without a number of tokens half of the context is theirs, if the prompt leaves none.
    result = lm.generate(prompt, max_new_tokens=None, overflow="truncate_left")
    assert (result.prompt_tokens, len(result.tokens), result.finish_reason) == (4, 4, "context")
    result = lm.generate(prompt[:7], max_new_tokens=None, overflow="truncate_left")
    assert (result.prompt_tokens, len(result.tokens)) == (7, 1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_slide_computes_the_newer_half_anew(options):
    """Where the context is full, it restarts from its newest half; every token is that of the whole model
    on the window it sees."""
    lm, sampling = tiny(), Sampling(**options)
    prompts = [[1, 2], list(range(8)), list(range(30))]
    results = lm.generate(prompts, max_new_tokens=21, overflow="slide", seed=[4, 5, 6], batch_size=2, **options)
    for prompt, seed, result in zip(prompts, (4, 5, 6), results, strict=True):
        window, tokens = prompt[-8:], []
        assert result.prompt_tokens == len(window)
        for step in range(21):
            tokens.append(choose(lm.logits(window)[0, -1], sampling, uniform(seed, 0, step)))
            window = [*window, tokens[-1]] if len(window) < 8 else [*window, tokens[-1]][-4:]
        assert (result.tokens, result.finish_reason) == (tokens, "length")


# A tokenizer of SentencePiece's kind, where a line end is a byte and a decoder takes the space from a text's beginning

PIECES = Tokenizer(llama2())
PROMPT = PIECES.encode("In the beginning")


def follows(text: str) -> LanguageModel:
    """Says `text` behind the prompt."""
    ids = PIECES.encode(text, continues=True)
    return scripted([0] * (len(PROMPT) - 1) + ids, tokenizer=PIECES)


def test_text_that_follows_a_prompt_keeps_its_first_space():
    ids = PIECES.encode(" the light 🙂", continues=True)
    result = follows(" the light 🙂").generate("In the beginning", max_new_tokens=len(ids))
    stream = follows(" the light 🙂").stream("In the beginning", max_new_tokens=len(ids))
    assert result.prompt_tokens == len(PROMPT)
    assert (result.tokens, result.text) == (ids, " the light 🙂")
    assert "".join(stream) == result.text == PIECES.decode([*PROMPT, *ids]).removeprefix("In the beginning")


def test_a_line_end_of_bytes_stops_at_its_own_token():
    result = follows(" light\n\nthe").generate("In the beginning", max_new_tokens=20, stop="\n\n")
    assert (result.text, result.stop, result.finish_reason) == (" light", "\n\n", "stop")
    assert result.tokens == PIECES.encode(" light\n\n", continues=True)


def test_an_empty_prompt_is_what_the_tokenizer_puts_around_a_text():
    lm = scripted([0], tokenizer=PIECES)
    lm.config = dataclasses.replace(lm.config, bos_token_id=None)
    assert lm.stream("", max_new_tokens=1).row.prompt == [1]
