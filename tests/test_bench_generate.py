"""The decoding benchmark, run on a tiny model on CPU tensors: answers, figures, targets, page, refusals."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from plots import PLOT

from bench import generate_page, generate_targets
from bench.cost_card import card, step
from bench.cuda_generate import SHORT, Case, measure
from bench.cuda_providers import (
    COMPILED,
    EAGER,
    GRAPH,
    JUDGE,
    NUMPY,
    OURS,
    RUNTIMES,
    TRANSFORMERS,
    OursEager,
    Runtime,
    TorchGraph,
    Transformers,
    random_model,
)
from bench.worker import Worker
from model import PRESETS, GPT2Config, LanguageModel, LlamaConfig
from model.rope import Rope

CONFIG = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=3)
_LLAMA = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 3000}
#: GPT-2, a LLaMA with everything that Llama 3.2 has, and a Mistral whose window is shorter than the texts.
CONFIGS = {
    "gpt2": CONFIG,
    "llama": LlamaConfig(**_LLAMA, rope=Rope(500.0, "llama3", 8.0, 1.0, 4.0, 32), tie_word_embeddings=True),
    "mistral": LlamaConfig(model_type="mistral", **_LLAMA, sliding_window=9),
}
CPU = torch.device("cpu")
CASES = (Case(2, 8, 4),)


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    return random_model(CONFIGS[request.param], CPU, "float32")


def prompts(batch, context):
    return np.random.default_rng(1).integers(0, 300, (batch, context)).tolist()


@pytest.mark.parametrize(("batch", "context", "new"), [(1, 1, 5), (3, 20, 12), (2, 40, 24)])
def test_the_rival_in_plain_torch_is_a_right_one(lm, batch, context, new):
    wanted = Transformers(lm, torch.float32)(prompts(batch, context), new)
    assert len({token for row in wanted for token in row}) > batch, "the text should not only repeat a token"
    graph = TorchGraph(lm)
    assert graph(prompts(batch, context), new) == wanted
    assert graph(prompts(batch, context), new) == wanted, "and again"
    assert Transformers(lm, torch.float32, static=True)(prompts(batch, context), new) == wanted
    assert OursEager(lm)(prompts(batch, context), new) == wanted


class Here:
    """A worker in this process, which is over when something goes wrong, as one in its own is."""

    def __init__(self, make, *arguments, ready):
        self._make, self._arguments, self._made = make, arguments, None

    def wait(self):
        self._made = self._told(self._make, *self._arguments)

    def call(self, method, *arguments):
        start = time.perf_counter()
        return self._told(getattr(self._made, method), *arguments), time.perf_counter() - start

    def close(self):
        self._made = None

    def _told(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as fault:
            raise RuntimeError(f"{type(fault).__name__}: {fault}") from None


def measured(cases=CASES, config=CONFIG, **options):
    defaults = {"device": "cpu", "dtype": "float32", "rounds": 2, "compiled": False, "bandwidth": 1e10, "start": Here}
    return [row for rows in measure("tiny", config, cases, **defaults | options) for row in rows]


def test_a_row_for_every_runtime():
    rows = measured()
    assert [row["runtime"] for row in rows] == [EAGER, GRAPH, TRANSFORMERS]
    moved = step(CONFIG, "float32", batch=2, context=10).moved
    for row in rows:
        assert row["regret"] <= 1e-4
        assert row["decode_tokens_per_second"] == pytest.approx(2 / (row["token_ms"] / 1e3))
        assert row["share_of_bandwidth"] == pytest.approx(moved / 1e10 / (row["token_ms"] / 1e3))
        assert row["over"].keys() == {EAGER, GRAPH, TRANSFORMERS} - {row["runtime"]}
    assert rows[1]["over"][EAGER] > 0
    assert "share_of_bandwidth" not in measured(bandwidth=None)[0]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_llama_has_the_same_rows(name):
    assert [row["runtime"] for row in measured(config=CONFIGS[name])] == [EAGER, GRAPH, TRANSFORMERS]
    assert all(row["regret"] <= 1e-4 and "token_ms" in row for row in measured(config=CONFIGS[name]))


def test_a_llama_has_no_more_positions_than_the_cases_need(monkeypatch):
    """A static cache of all that Llama 3.2 has would be 4 GB a row."""
    seen = set()

    def watched(lm):
        seen.add(lm.config.n_positions)
        return OursEager(lm)

    monkeypatch.setitem(RUNTIMES, EAGER, watched)
    measured([Case(1, 8, 4), Case(1, 1020, 5)], CONFIGS["llama"], rounds=1)
    measured([Case(1, 8, 4)], CONFIGS["llama"], rounds=1)
    measured([Case(1, 8, 4)], rounds=1)
    assert seen == {2048, 1024, CONFIG.n_positions}


def test_our_numpy_path_comes_last():
    row = measured(numpy=True)[-1]
    assert (row["runtime"], row["dtype"], row["over"]) == (NUMPY, "float32", {})
    assert row["regret"] <= 1e-4
    assert row["tokens_per_second"] > 0
    rows = [a_row(OURS), a_row(NUMPY, tokens_per_second=100.0) | {"dtype": "float32"}]
    found = {each["target"]: each for each in generate_targets.compared(rows, "NVIDIA H200")}
    (ratio,) = (each for name, each in found.items() if "NumPy" in name)
    assert (ratio["measured"], ratio["met"]) == (46.0, False)


@pytest.mark.parametrize("wrong", ["another token", "too many", "an error"])
def test_a_wrong_answer_gets_no_speed(monkeypatch, wrong):
    class Wrong(TorchGraph):
        def __call__(self, prompts, new):
            if wrong == "an error":
                raise RuntimeError("no memory\nat all")
            found = super().__call__(prompts, new)
            found[1][2:] = [(found[1][2] + 1) % 300] * (new - 2 if wrong == "another token" else new)
            return found

    monkeypatch.setitem(RUNTIMES, GRAPH, Wrong)
    rows = {row["runtime"]: row for row in measured()}
    words = {"another token": "wrong answer", "too many": "another number", "an error": "RuntimeError: no memory"}
    assert ("regret" in rows[GRAPH]) == (wrong == "another token")
    assert rows[GRAPH].get("regret", 1) > 1e-3
    assert "token_ms" not in rows[GRAPH]
    assert GRAPH not in rows[EAGER]["over"]
    assert words[wrong] in generate_page.tables(list(rows.values())).popitem()[1][1][1]


def test_what_fails_later_leaves_the_others_their_speed_and_starts_again_once(monkeypatch):
    class Fails(TorchGraph):
        turns, made = 0, 0

        def __init__(self, lm):
            Fails.made += 1
            super().__init__(lm)

        def __call__(self, prompts, new):
            Fails.turns += 1
            if Fails.turns > 2:
                raise RuntimeError("an illegal memory access")
            return super().__call__(prompts, new)

    class CannotBeMade:
        made = 0

        def __init__(self, lm):
            CannotBeMade.made += 1
            raise TypeError("no such argument\nat all")

    monkeypatch.setitem(RUNTIMES, GRAPH, Fails)
    monkeypatch.setitem(RUNTIMES, TRANSFORMERS, CannotBeMade)
    rows = measured([Case(1, 8, 4), Case(2, 8, 4), Case(3, 8, 4)])
    found = {(row["batch"], row["runtime"]): row for row in rows}
    for batch in (1, 2, 3):
        assert found[batch, GRAPH]["fault"] == "RuntimeError: an illegal memory access"
        assert found[batch, TRANSFORMERS]["fault"] == "TypeError: no such argument"
        assert "token_ms" in found[batch, EAGER]
        assert not found[batch, EAGER]["over"]
    assert (Fails.made, CannotBeMade.made) == (2, 1)


def test_one_that_has_started_again_has_figures(monkeypatch):
    class FailsOnce(TorchGraph):
        turns = 0

        def __call__(self, prompts, new):
            FailsOnce.turns += 1
            if FailsOnce.turns == 3:
                raise RuntimeError("out of memory")
            return super().__call__(prompts, new)

    monkeypatch.setitem(RUNTIMES, GRAPH, FailsOnce)
    rows = [row for row in measured([Case(1, 8, 4), Case(2, 8, 4)]) if row["runtime"] == GRAPH]
    assert rows[0]["fault"] == "RuntimeError: out of memory"
    assert rows[1]["over"][EAGER] > 0


def test_without_a_judge_there_is_no_speed(monkeypatch):
    def fails(lm):
        raise RuntimeError("no memory")

    monkeypatch.setitem(RUNTIMES, JUDGE, fails)
    for row in measured():
        assert row["fault"] == "not judged: RuntimeError: no memory"
        assert "token_ms" not in row


class Dies(Runtime):
    """Ends as a process does on a device that is lost."""

    def generate(self, prompts, new):
        os._exit(70)


def test_a_process_that_ends_is_a_fault_of_its_runtime_alone():
    """Real processes: the others' have their times, and the dead one's is started anew for the next case."""
    started = []

    def start(make, name, *arguments, **options):
        started.append(name)
        return Worker(Dies if name == GRAPH else make, name, *arguments, **options)

    found = {(row["batch"], row["runtime"]): row for row in measured([Case(1, 8, 4), Case(2, 8, 4)], start=start)}
    for batch in (1, 2):
        assert found[batch, GRAPH]["fault"] == "its process ended with code 70"
        assert found[batch, EAGER]["over"][TRANSFORMERS] > 0
    assert [started.count(name) for name in (EAGER, TRANSFORMERS, JUDGE, GRAPH)] == [1, 1, 1, 2]


def test_a_warm_up_that_fails_is_in_the_row(monkeypatch):
    def fails(lm, batch_size):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(LanguageModel, "warm_up", fails)
    monkeypatch.setattr("bench.cuda_generate.chosen", lambda device, **options: [OURS])
    monkeypatch.setitem(RUNTIMES, OURS, OursEager)
    (row,) = measured()
    assert row["warm_up_fault"] == "RuntimeError: no kernel image"
    assert "token_ms" in row


def test_a_token_that_is_none_does_not_get_to_the_judge(monkeypatch):
    monkeypatch.setitem(RUNTIMES, GRAPH, lambda lm: lambda prompts, new: [[3] * (new - 1) + [-1]] * len(prompts))
    rows = {row["runtime"]: row for row in measured()}
    assert rows[GRAPH]["fault"] == "a token of -1: its logits are not finite"
    assert "token_ms" in rows[EAGER]


def a_row(runtime, case=SHORT, preset="gpt2", **figures):
    figures = {"first_token_ms": 1.0, "token_ms": 0.2, "tokens_per_second_20_80": [1.0, 2.0], "over": {}} | figures
    figures = {"decode_tokens_per_second": 5000.0, "tokens_per_second": 4600.0, "regret": 0.0} | figures
    return {"preset": preset, "dtype": "float16", **case._asdict(), "runtime": runtime, **figures}


def test_targets_are_told_from_measured_figures():
    nothing = generate_targets.compared([], "NVIDIA H100 80GB HBM3")
    assert all(each["measured"] is None and each["met"] is None for each in nothing)
    rows = [a_row(OURS, over={TRANSFORMERS: 31.0, GRAPH: 2.5}), a_row(TRANSFORMERS), a_row(GRAPH)]
    found = {each["target"]: each["met"] for each in generate_targets.compared(rows, "NVIDIA H100 80GB HBM3")}
    assert found["decode, batch 1, context 128, tokens/s"] is False
    assert found["128 + 32 with prefill and sampling, tokens/s"] is True
    assert found[f"128 + 32 over {TRANSFORMERS}"] is True
    assert found[f"128 + 32 over {GRAPH}"] is False
    assert found[f"128 + 32 over {COMPILED}"] is None, "it did not run"
    assert found["GPT-2 XL, decode, batch 1, context 128, tokens/s"] is None
    elsewhere = {each["target"]: each["met"] for each in generate_targets.compared(rows, "NVIDIA H200")}
    assert elsewhere["128 + 32 with prefill and sampling, tokens/s"] is None
    assert elsewhere[f"128 + 32 over {TRANSFORMERS}"] is True
    large = [a_row(OURS, Case(64, 128, 32)), a_row(GRAPH, Case(64, 128, 32), token_ms=0.5)]
    found = {each["target"]: each for each in generate_targets.compared(large, "NVIDIA H200")}
    assert found[f"decode, batch 64, over {GRAPH}"]["measured"] == pytest.approx(2.5)
    wrong = {key: rows[0][key] for key in ("preset", "dtype", "batch", "context", "new", "runtime", "regret")}
    assert generate_targets.compared([wrong], "NVIDIA H100 80GB HBM3")[0]["met"] is False


def test_the_page_has_tables_and_plots():
    rows = measured()
    document = {"device": "a <CPU>", "date": "2026-11-27", "versions": {"torch": "2"}, "rows": rows}
    document |= {"card": card(["gpt2"], "float16", [(1, 128)], {"3 TB/s": 3e12})}
    document |= {"targets": generate_targets.compared(rows, "a CPU")}
    text = generate_page.page(json.loads(json.dumps(document))).html
    assert text.count(PLOT) == 2
    for word in ("a &lt;CPU&gt;", TRANSFORMERS, "247.3 MB", "not yet measured", "batch 2, 8 + 4 tokens"):
        assert word in text


def test_the_page_without_matplotlib_says_so(no_matplotlib):
    document = {"device": "a CPU", "date": "2026-11-27", "versions": {}, "rows": measured(), "targets": []}
    document |= {"card": card(["gpt2"], "float16", [(1, 128)], {})}
    assert generate_page.page(document).html.count("(No plot, as matplotlib is not installed: tiny: ") == 2


def test_the_card():
    """GPT-2 has 124,439,808 parameters, 1024 x 768 of them positions."""
    cost = step(PRESETS["gpt2"], "float16", batch=8, context=900)
    assert cost.weights == 2 * (124_439_808 - 1024 * 768)
    assert cost.cache == 2 * 2 * 12 * 8 * 900 * 768
    assert cost.limit(1e12) == pytest.approx(8 * 1e12 / (cost.weights + cost.cache))
    # A table of a head of its own is looked up, and not multiplied; keys and values of 8 heads of 128, in a window.
    cost = step(PRESETS["mistral-7b"], "bfloat16", batch=2, context=5000)
    assert cost.weights == 2 * (7_241_732_096 - 32000 * 4096)
    assert cost.cache == 2 * 2 * 32 * 2 * 4096 * 8 * 128


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--preset", "gpt3"], "gpt2-xl"),
        (["--device", "cuda"], "CUDA"),
        (["--device", "cpu", "--case", "1x128+32"], "--case"),
        (["--preset", "gpt2", "--preset", "gpt2-xl"], "one preset"),
        (["--html", "no/such/folder.html"], "no folder"),
        (["--html", "/"], "/: no file can be written there"),
        (["--dtype", "int8"], "float16"),
        (["--device", "cpu", "--dtype", "float32"], "--dtype"),
        (["--device", "cpu", "--persistent"], "--persistent"),
        (["--device", "tpu"], "auto, cpu or cuda"),
    ],
    ids=lambda each: each if isinstance(each, str) else " ".join(each),
)
def test_refusals_are_one_line(arguments, word):
    if torch.cuda.is_available() and "cpu" not in arguments:
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "bench.generate", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr


@pytest.mark.parametrize("text", ["8x128", "0x1+2", "1x8+1", "1x8+32 ", "ax1+2"])
def test_a_case_that_cannot_be(text):
    assert Case.read("64x900+32") == Case(64, 900, 32)
    with pytest.raises(ValueError, match="8x128\\+32"):
        Case.read(text)
    with pytest.raises(ValueError, match="64 positions"):
        Case(1, 60, 5).check([CONFIG])
