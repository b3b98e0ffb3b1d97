"""What a cast of a whole model loses: exactly what was planted, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from damage import CONFIG, make, tensors

import model
from gpukernels.cast import Losses
from model.audit import audit
from model.device import choose_device
from model.load import BUNDLED, locate, plan

QKV, UP, BIAS = "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.0.mlp.c_fc.bias"


@pytest.fixture
def planted(tmp_path):
    """A float32 model in whose weights there are values of every kind; the counts that are to be found."""
    every = {name: np.where(abs(array) < 1e-3, np.float32(0.5), array) for name, array in tensors().items()}
    every[QKV].flat[[0, 7, 100]] = 65520.0, -1e38, 3e5
    every[QKV].flat[[11, 12]] = np.nan, -np.inf
    every[UP].flat[[1, 2, 3, 4]] = 1e-8, -1e-45, 2.0**-25, 1e-38
    every[UP].flat[[5, 6]] = 6e-5, -(2.0**-24)
    every[BIAS].flat[[0]] = 65519.0
    want = {
        QKV: {"nonfinite": 2, "overflowed": 3, "underflowed": 0, "subnormal": 0},
        UP: {"nonfinite": 0, "overflowed": 0, "underflowed": 4, "subnormal": 2},
    }
    return make(tmp_path / "planted", CONFIG, every), want


DEVICES = ["cpu", torch.device("cpu")]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_planted_counts_are_found_and_nothing_else(planted, device):
    folder, want = planted
    found = audit(plan(folder), choose_device(device), "float16")
    none = dict.fromkeys(want[QKV], 0)
    assert {name: {kind: getattr(lost, kind) for kind in none} for name, lost in found.losses.items()} == {
        name: want.get(name, none) for name in tensors()
    }
    assert found.total.values == sum(array.size for array in tensors().values())
    assert max(lost.error for lost in found.losses.values()) == found.total.error <= 2.0**-11
    assert found.logits is None  # with NaN among the weights there is nothing to compare with


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_change_of_logits_is_that_of_a_model_with_rounded_weights(tmp_path, device, dtype):
    folder = make(tmp_path / "tiny")
    found = audit(plan(folder), choose_device(device), dtype)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, CONFIG.n_positions)
    before = model.load(folder, device=device, dtype="float32").logits(ids)
    if device == "cpu":
        lm = model.load(folder, device="cpu", dtype="float32")
        for array in lm.parameters.values():
            array[...] = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
    else:
        lm = model.load(folder, device=device, dtype=dtype)
    after = lm.logits(ids)
    change = float(np.abs(after - before).max())
    assert change > 0
    assert found.logits.absolute == pytest.approx(change, rel=1e-6)
    assert found.logits.relative == pytest.approx(change / np.abs(before).max(), rel=1e-6)
    assert found.logits.same_choice == (before.argmax(-1) == after.argmax(-1)).mean()
    assert (found.logits.tokens, found.logits.nonfinite) == (CONFIG.n_positions, 0)


def test_the_embedded_model_is_stored_in_float16_and_loses_nothing():
    found = audit(plan(locate(BUNDLED)), choose_device("cpu"), "float16")
    assert found.total == Losses(values=5_918_720)
    assert found.logits.absolute == 0
    rounded = audit(plan(locate(BUNDLED)), choose_device("cpu"), "bfloat16").total
    assert (rounded.overflowed, rounded.nonfinite) == (0, 0)
    assert 2.0**-9 < rounded.error <= 2.0**-8


def test_overflow_that_reaches_the_logits_is_said(tmp_path, run):
    every = tensors()
    every["ln_f.weight"][:] = 1e5
    folder = make(tmp_path / "large", CONFIG, every)
    code, out, _ = run("check", "--audit", folder, "--json")
    document = json.loads(out)["audit"]
    assert code == 0
    assert document["total"]["overflowed"] == document["tensors"]["ln_f.weight"]["overflowed"] == 8
    assert document["logits"]["absolute"] is None
    assert document["logits"]["nonfinite"] > 0
    assert document["load"]["gigabytes_per_second"] > 0
    assert run("check", "--audit", folder, "--json", "--fail-on-overflow")[0] == 1
    assert run("check", "--audit", folder, "--dtype", "bfloat16", "--fail-on-overflow")[0] == 0


def test_the_table_has_the_tensors_that_lose_and_the_sum(planted, run):
    folder, want = planted
    code, out, _ = run("check", "--audit", folder)
    rows = {line.split("│")[1].strip(): line.split("│")[2:8] for line in out.splitlines() if line.startswith("│")}
    rows = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert code == 0
    assert list(rows) == [QKV, UP, f"{len(tensors()) - 2} others", f"all {len(tensors())}"]
    for name, counts in want.items():
        assert rows[name][1:5] == [str(count) for count in counts.values()]
    assert rows[f"all {len(tensors())}"][1:5] == ["2", "3", "4", "2"]
    assert "nothing to compare" in out


def test_a_model_that_would_not_load_is_not_audited(tmp_path, run):
    folder = make(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    code, out, _ = run("check", "--audit", folder, "--json")
    assert code == 1
    assert "audit" not in json.loads(out)


@pytest.mark.parametrize("arguments", [("--dtype", "bfloat16"), ("--fail-on-overflow",)])
def test_the_audits_options_need_the_audit(refused, arguments):
    (line,) = refused("check", BUNDLED, *arguments)
    assert "give --audit too" in line


def test_an_output_matrix_of_its_own_is_counted_and_said(tmp_path, run):
    every = tensors()
    every["lm_head.weight"] = every["wte.weight"].copy()
    tied = json.loads(run("check", "--audit", make(tmp_path / "tied", CONFIG, dict(every)), "--json")[1])
    every["lm_head.weight"].flat[5] = 1e9
    own = make(tmp_path / "own", CONFIG, every)
    document = json.loads(run("check", "--audit", own, "--json")[1])
    assert "lm_head.weight" not in tied["audit"]["tensors"]
    assert document["audit"]["tensors"]["lm_head.weight"]["overflowed"] == 1
    assert (tied["notices"], len(document["notices"])) == ([], 1)
    assert f"{len(every)} tensors fit the config" in run("check", "--audit", own)[1]


def test_a_dtype_that_is_not_audited_is_refused(refused):
    (line,) = refused("check", BUNDLED, "--audit", "--dtype", "float32")
    assert line == "error: --dtype must be float16 or bfloat16, got 'float32'"


def test_loading_counts_as_the_audit_does(planted):
    folder, want = planted
    with pytest.warns(model.LoadNotice):
        lm = model.load(folder, device="cpu", dtype="float16")
    assert lm.notices == [f"{QKV}: 3 values are too large for float16 and became infinite"]
    assert lm.filled.losses[UP].underflowed == want[UP]["underflowed"]
    assert lm.filled.nbytes == sum(array.nbytes for array in tensors().values())
