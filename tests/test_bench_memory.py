"""bench.memory: its rows, a wrong answer, and its page, on a model that loads in no time."""

import json
import sys

import numpy as np
import pytest
import typer
from damage import CONFIG
from plots import PLOT

from bench import memory
from bench.loading import Transformers
from model.memory import weight_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_rows_and_page_of_ours(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(memory.PRESETS, "gpt2", CONFIG)
    monkeypatch.delitem(memory.RUNTIMES, "transformers")
    files = {"json_file": tmp_path / "figures.json", "html": tmp_path / "page.html"}
    memory.main(preset=["gpt2"], every=False, device="cpu", rounds=2, **files)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "figures.json").read_text()) == document
    assert {"date", "commit", "versions", "device"} <= document.keys()
    assert [(row["model"], row["dtype"], row["runtime"]) for row in document["loads"]] == [
        ("gpt2", dtype, "ours") for dtype in memory.DTYPES
    ]
    for row in document["loads"]:
        assert not row["wrong"]
        assert row["seconds_to_logits"] > row["seconds"] > 0
        assert row["weights"] == weight_bytes(CONFIG, row["dtype"])
        assert row["peak"] >= row["held"]
    assert len(document["footprints"]) == 8
    assert {row["share"] for row in document["footprints"] if row["dtype"] == "float32"} == {1.0}
    page = (tmp_path / "page.html").read_text()
    assert page.count(PLOT) == 3
    assert all(text in page for text in ("gpt2-xl", "ours", "float16"))


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(typer.BadParameter, match="there is no folder"):
        memory.main(json_file=tmp_path / "nowhere" / "figures.json")
    with pytest.raises(typer.BadParameter, match="no file can be written there"):
        memory.main(html=tmp_path)


def test_a_device_that_there_is_not_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr("model.device.why_no_cuda", lambda: "there is none in this test")
    for device, words in (("cuda", "there is none in this test"), ("gpu", "device must be")):
        with pytest.raises(typer.BadParameter, match=words):
            memory.main(device=device)


def test_a_wrong_answer_has_no_figures():
    truth = np.ones((8, 5), np.float32)
    found = {"logits": truth * 1.1, "seconds": 1.0, "seconds_to_logits": 2.0, "peak": 3, "held": 2}
    row = memory._row("gpt2", "float16", "transformers", found, truth)
    assert row["wrong"]
    assert row["max_logit_error"] == pytest.approx(0.1)
    assert not {"seconds", "peak", "held"} & row.keys()
    assert memory._load_cells(row)[3] == "wrong answer"
    nothing = {**found, "logits": truth * np.nan}
    assert memory._row("gpt2", "float16", "ours", nothing, truth)["wrong"]


def test_a_runtime_that_fails_has_a_row_and_the_other_its_figures(monkeypatch):
    class Worker:
        def __init__(self, make, *arguments):
            self._fails = make is memory.Transformers

        def call(self, *arguments):
            if self._fails:
                raise RuntimeError("its process ended with code -9")
            logits = np.ones((8, 5), np.float32)
            return {"logits": logits, "seconds": 1.0, "seconds_to_logits": 2.0, "peak": 3, "held": 2}, 0.0

        def close(self):
            pass

    monkeypatch.setitem(memory.PRESETS, "gpt2", CONFIG)
    monkeypatch.setattr(memory, "Worker", Worker)
    monkeypatch.setattr(memory, "installed", lambda name: True)
    rows = memory._loads("gpt2", "cpu", 1)
    assert [row["wrong"] for row in rows] == [False, True] * 2
    assert memory._load_cells(rows[1])[3] == "its process ended with code -9"


@linux
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_same_model(tmp_path):
    import model

    lm = model.from_config(CONFIG, device="cpu")
    lm.save(tmp_path / "tiny")
    found = Transformers(tmp_path / "tiny", "cpu", "float32").load([1, 2, 3], 1)
    np.testing.assert_allclose(found["logits"], lm.logits([1, 2, 3])[0], atol=1e-4)


def test_an_unknown_preset_is_refused():
    with pytest.raises(memory.typer.BadParameter, match=r"one of gpt2, .*got 'gpt9'"):
        memory.main(preset=["gpt9"], every=False, device="cpu", rounds=1, html=None)
