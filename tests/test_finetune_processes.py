"""Two processes give what one gives with the doubled batch, and one that fails ends the run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from plots import MATPLOTLIB
from processes import launch
from reference import read_weights
from rich.console import Console

import model
from model import gpt2
from model.config import GPT2Config
from model.finetune.log import read

CONFIG = GPT2Config(vocab_size=83, n_positions=16, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)

# Documents that count up, which is learned in a few steps, of 3 to 40 tokens in windows of 16: passes are ragged,
# and in the last step of an epoch a rank has nothing.
STREAM = np.concatenate([np.append(1 + (np.arange(length) + 5 * length) % 82, 0) for length in range(3, 41, 2)])

OPTIONS = {
    "epochs": 2,
    "context": 16,
    "learning_rate": 3e-3,
    # So large that AdamW does not blow up the rounding of gradients which are 0 but for it, as the keys' bias is.
    "eps": 1e-3,
    "clip": 0.5,
    "validation": 0.2,
    "evaluate_every": 3,
}

#: Several runs in the same processes, for starting those takes longer than any run.
#: Half-way through a block, forward and backward, it is counted how many numbers of the model this rank has.
TRAIN = """
import json, os, sys, numpy as np, torch, model
from model import gpt2
from model.finetune.distributed import joined, local
from model.finetune.train import Trainer
from model.on_disk import load_on_disk

init, attention, held = Trainer.__init__, gpt2.packed_attention, {}

def watched(self, network, *args, **options):
    global watching
    watching = network
    init(self, network, *args, **options)

def count(_=None):
    now = sum(local(each.detach()).numel() for each in watching.parameters())
    held[name] = max(held.get(name, 0), now)

def counted(*args, **options):
    count()
    y = attention(*args, **options)
    if y.requires_grad:
        y.register_hook(count)
    return y

Trainer.__init__, gpt2.packed_attention = watched, counted
folder, out, runs = sys.argv[1], sys.argv[2], eval(sys.argv[3])
with joined(torch.device("cpu")):
    for name, options in runs:
        lm = (load_on_disk if name.startswith("shards") else model.load)(f"{folder}/model", device="cpu")
        print(f"run {name}", file=sys.stderr)
        lm.finetune(np.load(f"{folder}/data.npy"), out=f"{out}/{name}", **options)
        if not name.startswith("shards"):
            saved = model.load(f"{out}/{name}", device="cpu").parameters
            assert all((lm.parameters[key] == saved[key]).all() for key in saved), "the model is not what was saved"
with open(f"{out}/held-{os.environ['RANK']}.json", "w") as file:
    json.dump(held, file)
"""

KINDS = {
    "plain": {"batch_size": 2},
    "accumulating": {"batch_size": 1, "accumulate": 3},
    "adapters": {"batch_size": 2, "lora_rank": 4, "lora_targets": ["qkv", "up"], "recompute": True},
    "shards": {"batch_size": 1, "accumulate": 2, "fsdp": True},
    "shards of adapters": {"batch_size": 2, "lora_rank": 4, "lora_targets": ["down"], "recompute": True, "fsdp": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model.from_config(CONFIG, seed=1, device="cpu").save(path / "model")
    np.save(path / "data.npy", STREAM)
    return path


def run_one(folder, out, **options):
    lm = model.load(folder / "model", device="cpu")
    lm.finetune(np.load(folder / "data.npy"), out=out, console=Console(quiet=True), **OPTIONS, **options)


@pytest.fixture(scope="module")
def two(folder):
    """The runs of two processes, and what each rank said."""
    runs = [(name, OPTIONS | options) for name, options in KINDS.items()]
    for name, kind in (("parts", "plain"), ("parts of shards", "shards")):
        runs += [(name, OPTIONS | KINDS[kind] | more) for more in ({"max_time": 1e-9}, {"resume": True})]
    found = launch(TRAIN, folder, folder / "two", runs)
    for code, said in found:
        assert code == 0, said
    return folder / "two", [said for _, said in found]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_the_doubled_batch(folder, two, tmp_path, kind):
    options = KINDS[kind]
    run_one(folder, tmp_path / "one", **{**options, "batch_size": 2 * options["batch_size"], "fsdp": False})
    ours, wanted = two[0] / kind, tmp_path / "one"
    records = list(zip(read(ours / "log.jsonl"), read(wanted / "log.jsonl"), strict=True))
    assert len(records) > 10
    for our, want in records:
        for key in ("kind", "step", "tokens", "rate"):
            assert our.get(key) == want.get(key)
        for key in ("loss", "validation_loss", "gradient_norm"):
            # Means of up to 60 losses of 4: float32's rounding of each, and of the weights after 20 updates.
            assert (key in our) == (key in want)
            assert our.get(key, 0) == pytest.approx(want.get(key, 0), rel=1e-5)
    first, second, before = (model.load(path, device="cpu").parameters for path in (ours, wanted, folder / "model"))
    moved = max(float(np.abs(first[name] - before[name]).max()) for name in first)
    apart = max(float(np.abs(first[name] - second[name]).max()) for name in first)
    # An update is at most the rate times (error of a gradient) / eps, and these are 1e-7 of a norm of 1 apart.
    assert apart < 1e-5
    assert moved > 100 * apart


@pytest.mark.parametrize("kinds", [("plain", "parts"), ("shards", "parts of shards")])
def test_two_processes_go_on_where_they_stopped(two, kinds):
    whole, parts = (model.load(two[0] / name, device="cpu").parameters for name in kinds)
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_three_processes_go_on_to_the_same_bits(folder, tmp_path):
    """Sums of three depend on their order, which torch changes behind a process's first step; of 16 bits it shows."""
    options = OPTIONS | {"batch_size": 1, "dtype": "bfloat16", "max_steps": 4}
    runs = [("whole", options), ("parts", options | {"max_time": 1e-9}), ("parts", options | {"resume": True})]
    for code, said in launch(TRAIN, folder, tmp_path, runs, size=3):
        assert code == 0, said
    whole, parts = (read_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_no_rank_ever_has_all_parameters_at_once(two):
    sizes = {slot.name: slot.size for slot in gpt2.slots(CONFIG)}
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    for rank in range(2):
        held = json.loads((two[0] / f"held-{rank}.json").read_text())
        assert held["plain"] == sum(sizes.values())
        # The tables, the block that computes and the one that comes next, and half of the two others.
        assert block < held["shards"] <= sum(sizes.values()) - block
        assert held["shards of adapters"] < held["adapters"] - block / 2


def test_rank_0_alone_writes_and_prints(two):
    out, (leader, other) = two
    assert leader.count("validation loss") > 10
    assert [line for line in other.splitlines() if line] == [
        f"run {name}" for name in [*KINDS, "parts", "parts", "parts of shards", "parts of shards"]
    ]
    assert sorted(each.name for each in (out / "plain").iterdir()) == [
        "config.json", "log.jsonl", *["loss.png"] * MATPLOTLIB, "model.safetensors"]  # fmt: skip


def test_a_run_of_two_is_not_resumed_by_one(folder, tmp_path):
    run_one(folder, tmp_path / "out", batch_size=2, max_time=1e-9)
    document = next((tmp_path / "out").glob("checkpoint-*/training.json"))
    values = json.loads(document.read_text())
    assert values["started"]["processes"] == 1
    values["started"]["processes"] = 2
    document.write_text(json.dumps(values))
    with pytest.raises(model.ModelError, match="the run was started with processes 2, not 1"):
        run_one(folder, tmp_path / "out", batch_size=2, resume=True)


FAIL = """
import os
from model.finetune.train import Trainer
if os.environ["RANK"] == "1":
    step = Trainer._step
    def fail(self):
        if self.progress.step == 2:
            raise RuntimeError("this rank is out of luck")
        step(self)
    Trainer._step = fail
"""


def test_a_rank_that_fails_ends_the_others(folder, tmp_path):
    runs = [("out", OPTIONS | KINDS["plain"])]
    (first, _), (second, said) = launch(FAIL + TRAIN, folder, tmp_path, runs)
    assert first != 0
    assert second != 0
    assert "this rank is out of luck" in said


APART = """
import os, sys, numpy as np, torch, model
from model.finetune.distributed import joined
rank = int(os.environ["RANK"])
with joined(torch.device("cpu")):
    all = np.arange(1, 81)
    for data, options in (all[40 * rank :][:40], {}), (all, {"seed": rank}), (all, {"fsdp": True}):
        lm = model.load(sys.argv[1], device="cpu")
        if "fsdp" in options:
            lm.parameters["positions.weight"][0, 1] = np.nan  # of the first rank's half
        try:
            lm.finetune(data, max_steps=2, **options)
        except model.ModelError as fault:
            print(fault)
"""


def test_processes_are_refused_what_they_cannot_train_together(folder):
    """Each takes its share of a batch by itself: half of the data would be a quarter of it."""
    for code, said in launch(APART, folder / "model"):
        assert (code, said.count("the processes have different models, data or options")) == (0, 2), said
        assert "positions.weight: 1 of 512 numbers are infinite or NaN" in said


def test_what_rank_0_refuses_ends_the_others(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").touch()
    (first, said), (second, _) = launch(TRAIN, folder, tmp_path, [("out", OPTIONS)])
    assert first != 0
    assert second != 0
    assert f"{tmp_path / 'out'}: exists; give another folder" in said


def test_torchrun_runs_the_command(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "model.cli"]
    options = ["--model", folder / "model", "--data", folder / "data.npy", "--out", tmp_path / "out"]
    options += ["--context", "16", "--max-steps", "2", "--device", "cpu"]
    done = subprocess.run([*command, "finetune", *map(str, options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 2 steps") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
