"""`gpukernels finetune`: from a text to a model that generates, and one line for every mistake."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from plots import MATPLOTLIB
from reference import from_pretrained

import model

#: A text that the embedded model has not seen, and is nothing like its own.
TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = ("--context", "48", "--batch-size", "4", "--lr", "1e-3", "--max-steps", "12", "--separator", "\n\n")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_embedded_model_learns_a_text_and_generates(run, text, tmp_path):
    out = tmp_path / "out"
    code, said, shown = run("finetune", "--data", text, "--out", out, "--validation", "0.1", "--quiet", *SMALL)
    assert (code, shown) == (0, "")
    records = log(out)
    evaluations = [record["perplexity"] for record in records if record["kind"] == "evaluation"]
    assert evaluations[-1] < 0.8 * evaluations[0]
    assert len([record for record in records if record["kind"] == "step"]) == 12
    assert said.startswith("finished after 12 steps; best at step 12: validation loss ")
    assert (out / "loss.png").exists() == MATPLOTLIB
    code, answer, _ = run("generate", "The kernels", "--model", out, "-t", "5", "--json")
    assert code == 0
    # transformers reads the same model.
    ids = model.load(out).tokenizer.encode("The kernels")
    theirs = from_pretrained(out).generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert json.loads(answer)["tokens"] == theirs[0, len(ids) :].tolist()


def test_what_trains_and_how_it_goes_is_shown(run, text, tmp_path):
    options = (*SMALL[:6], "--max-steps", "1", "--separator", "\n\n", "--freeze", "blocks.*", "--validation", "0")
    code, said, shown = run("finetune", "--data", text, "--out", tmp_path / "out", *options)
    assert code == 0
    assert "blocks.*.qkv.weight" in shown
    assert "tokens/s" in shown
    assert said == f"finished after 1 steps; written to {tmp_path / 'out'}\n"


def test_rank_0_alone_prints(run, text, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    options = (*SMALL[:6], "--max-steps", "1", "--validation", "0")
    assert run("finetune", "--data", text, "--out", tmp_path / "out", *options) == (0, "", "")


def test_a_signal_ends_the_command_with_its_code_and_resume_goes_on(run, text, tmp_path):
    out = tmp_path / "out"
    command = ["finetune", "--data", text, "--out", out, "--validation", "0", "--quiet", *SMALL]
    process = subprocess.Popen([sys.executable, "-m", "model.cli", *command], stdout=subprocess.PIPE)
    while process.poll() is None and not ((out / "log.jsonl").exists() and len(log(out)) > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert said.startswith(b"interrupted after ")
    code, said, _ = run(*command, "--resume")
    assert (code, said.partition(";")[0]) == (0, "finished after 12 steps")
    assert [record["step"] for record in log(out)] == list(range(1, 13))


# --- mistakes

BAD_OPTIONS = {
    "rate 0": (("--lr", "0"), "learning_rate must be a number above 0 and at most 1, got 0.0"),
    "rate nan": (("--lr", "nan"), "learning_rate must be a number above 0 and at most 1, got nan"),
    "batch": (("--batch-size", "0"), "batch_size must be a whole number, 1 or more, got 0"),
    "accumulate": (("--accumulate", "-1"), "accumulate must be a whole number, 1 or more, got -1"),
    "epochs": (("--epochs", "0"), "epochs must be a whole number, 1 or more, got 0"),
    "context": (("--context", "513"), "context is 513, but the model has 512 positions"),
    "floor": (("--floor", "1"), "floor must be a number from 0 to the learning rate 0.0001, got 1.0"),
    "warmup": (("--warmup", "10", "--max-steps", "3"), "warmup is 10 steps, but the run has only 3"),
    "schedule": (("--schedule", "step"), "schedule must be one of constant, linear, cosine, inverse_sqrt, got 'step'"),
    "validation": (("--validation", "1"), "validation must be a share from 0 to below 1, got 1.0"),
    "patience": (("--patience", "2", "--validation", "0"), "patience waits for a better validation loss, and there is"),
    "betas": (("--betas", "0.9", "1"), "betas must be two numbers from 0 to below 1, got (0.9, 1.0)"),
    "freeze": (("--freeze", "blocks.*.qvk.*"), "'blocks.*.qvk.*' matches nothing; there is blocks.*.qkv.bias"),
    "layers": (("--layers", "4-9"), "layers must be from 0 to 5"),
    "dtype": (("--dtype", "int8"), "dtype must be float32, float16, bfloat16 or auto, got 'int8'"),
    "tracker": (("--tracker", "paper"), "a tracker must be one of tensorboard, wandb, got 'paper'"),
    "resume": (("--resume",), "there is no run to resume: the folder does not exist"),
    "model": (("--model", "./no-such"), "there is no such file or folder"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_makes_no_sense_is_one_line(refused, text, tmp_path, name):
    options, message = BAD_OPTIONS[name]
    (line,) = refused("finetune", "--data", text, "--out", tmp_path / "out", "--quiet", *options)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_every_option_that_makes_no_sense_is_named(refused, text, tmp_path):
    lines = refused("finetune", "--data", text, "--out", tmp_path / "out", "--lr", "-1", "--batch-size", "0", lines=2)
    assert [line.split()[1] for line in lines] == ["batch_size", "learning_rate"]


BAD_DATA = {
    "missing.txt": (None, "cannot be read: No such file or directory"),
    "empty.txt": (b"", "the file is empty"),
    "binary.txt": (b"ab\n\xff", "line 2 is not UTF-8 text"),
    "blank.txt": (b" \n \n", "there is no text in it"),
    "line.jsonl": (b'{"text": "a b"}\n{"text": ', "line 2: not valid JSON"),
    "field.jsonl": (b'{"prompt": "a"}', 'line 1: "completion" is missing'),
    "no-token.jsonl": (b'{"text": ""}', "line 1: there is no token in it"),
    "kind.csv": (b"a,b", "must be .txt, .jsonl or .npy"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_used_is_one_line(refused, tmp_path, name):
    content, message = BAD_DATA[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (line,) = refused("finetune", "--data", tmp_path / name, "--out", tmp_path / "out", "--quiet")
    assert line.startswith(f"error: {tmp_path / name}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_data_without_a_prediction_is_one_line(refused, tmp_path):
    np.save(tmp_path / "ids.npy", np.ones((3, 1), np.int32))
    options = ("--out", tmp_path / "out", "--validation", "0")
    (line,) = refused("finetune", "--data", tmp_path / "ids.npy", *options)
    assert "nothing to predict" in line
    np.save(tmp_path / "ids.npy", np.full((3, 4), 5000))
    (line,) = refused("finetune", "--data", tmp_path / "ids.npy", *options)
    assert "5000" in line


def test_a_folder_that_exists_is_not_overwritten(refused, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    (line,) = refused("finetune", "--data", text, "--out", out)
    assert line == f"error: {out}: exists; give another folder, or resume the run that it holds"
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_without_torch_the_extra_is_named(refused, text, tmp_path, monkeypatch):
    find = model.language_model.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    (line,) = refused("finetune", "--data", text, "--out", tmp_path / "out", "--quiet")
    assert line == "error: fine-tuning needs torch: pip install 'gpukernels[train]'"
