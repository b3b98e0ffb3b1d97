"""LoRA: PEFT is the judge, of the numbers while training and of the files."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from decoding import MISTRAL
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import model
from model.adapter import LowRank, merge, products, read_adapter, write_adapter
from model.architecture import architecture
from model.cli.app import main
from model.config import GPT2Config
from model.errors import CheckpointError, ModelError
from model.finetune.adapters import adapters, attach, first_values
from model.finetune.distributed import World, fill
from model.finetune.lora import Lora
from model.finetune.modules import Network
from model.load import locate

CONFIG = GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
ALL = ("qkv", "projection", "up", "down")
IDS = np.random.default_rng(1).integers(0, 61, (2, 24))


LLAMA = replace(MISTRAL, num_hidden_layers=3, bos_token_id=0, eos_token_id=0)


both = pytest.mark.parametrize("folder", [CONFIG, LLAMA], ids=["gpt2", "llama"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("base")
    lm = model.from_config(getattr(request, "param", CONFIG), seed=3, device="cpu")
    for name, array in lm.parameters.items():
        array *= 5 if name.endswith("weight") and array.ndim > 1 else 1  # far from linear
    lm.save(path)
    return path


def network(folder, lora, seed=0):
    """Ours, with adapters, and the layers that have them."""
    lm = model.load(folder, device=torch.device("cpu"))
    made = Network(lm.parameters, lm.config)
    layers = lora.layers(products(lm.config))
    attach(made, layers, lora)
    fill(made, first_values(made, seed), World())
    return made, layers


def trained(folder, lora):
    """As after training: b is no longer 0."""
    made, layers = network(folder, lora)
    random = torch.Generator().manual_seed(5)
    for name in layers:
        b = made.get_submodule(name).adapter.b
        b.data.copy_(torch.randn(b.shape, generator=random) * 0.2)
    return made, layers


def loss(made, ids=IDS):
    """The sum over all next tokens."""
    tokens = torch.tensor(ids)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return made(tokens, targets, positions)


def peft_model(folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings(action="error", category=UserWarning):  # a file that is not as theirs would be
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)


def theirs(made, ids=IDS):
    with torch.no_grad():
        return made.eval()(torch.tensor(ids)).logits.numpy()


LORAS = [
    Lora(),
    Lora(4, 12.0, ALL),
    Lora(2, 3, ("qkv", "down"), rank_stabilized=True),
    Lora(3, 6.0, ("blocks.1.*", "blocks.[02].projection")),
]


@both
@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_peft_loads_what_is_written_and_agrees_in_loss_and_gradients(folder, tmp_path, lora):
    made, layers = trained(folder, lora)
    options = {"alpha": lora.alpha, "rank_stabilized": lora.rank_stabilized}
    write_adapter(tmp_path, made.config, adapters(made), **options, base=str(folder))
    judge = peft_model(folder, tmp_path)
    ours = loss(made)
    ours.backward()
    tokens = torch.tensor(IDS)
    want = judge(tokens, labels=tokens).loss * (IDS.size - len(IDS))
    want.backward()
    # Sums of 46 losses of 4 or so, each with the rounding of logits of a few units.
    assert ours.item() == pytest.approx(want.item(), abs=1e-3)
    gradients = {name: each.grad for name, each in judge.named_parameters() if each.requires_grad}
    assert len(gradients) == 2 * len(layers)
    slots = products(made.config)
    for name in layers:
        module = f"base_model.model.{architecture(made.config).PREFIX}{slots[name].source.removesuffix('.weight')}"
        adapter = made.get_submodule(name).adapter
        for ours, kind in ((adapter.a, "A"), (adapter.b, "B")):
            wanted = gradients[f"{module}.lora_{kind}.default.weight"]
            # Float32 sums of 48 tokens through three blocks, in another order.
            assert torch.allclose(ours.grad, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()) + 1e-5)
    assert all(each.grad is None for name, each in made.named_parameters() if ".adapter." not in name)


@both
@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_an_adapter_loaded_into_ours_and_merged_weights_agree_with_peft(folder, tmp_path, lora):
    made, _ = trained(folder, lora)
    write_adapter(tmp_path, made.config, adapters(made), alpha=lora.alpha, rank_stabilized=lora.rank_stabilized)
    want = theirs(peft_model(folder, tmp_path))
    lm = model.load(folder, device="cpu")
    before = lm.logits(IDS)
    lm.load_adapter(tmp_path)
    assert np.abs(lm.logits(IDS) - want).max() < 1e-4 < np.abs(before - want).max()
    for name in lm.parameters:
        weight = made.weight(name)
        assert weight.shape == lm.parameters[name].shape
        # One sum of rank products and a weight, of numbers below 2.
        assert np.abs(weight.numpy() - lm.parameters[name]).max() <= 8 * 2**-23


def test_the_files_hold_the_bits_that_trained_under_pefts_names(folder, tmp_path):
    made, _ = trained(folder, LORAS[1])
    write_adapter(tmp_path, made.config, adapters(made), alpha=12.0)
    judge = peft_model(folder, tmp_path)
    judge.save_pretrained(tmp_path / "theirs")
    for name, tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        assert (load_file(tmp_path / "adapter_model.safetensors")[name] == tensor).all()
    again = read_adapter(tmp_path, made.config)
    for name, adapter in adapters(made).items():
        assert (again[name].a == adapter.a).all()
        assert (again[name].b == adapter.b).all()
        assert again[name].scale == 12.0 / 4
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_file()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_adapter_that_peft_made_loads(folder, tmp_path, dtype):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transposed = base.config.model_type == "gpt2"
    options = {"target_modules": ["c_proj"] if transposed else ["q_proj", "down_proj"], "fan_in_fan_out": transposed}
    options |= {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    judge = peft.get_peft_model(base, peft.LoraConfig(r=5, lora_alpha=7, init_lora_weights=False, **options))
    for name, each in judge.named_parameters():
        if ".lora_" in name:
            each.data.copy_(each.data.to(dtype))
    judge.save_pretrained(tmp_path)
    if dtype != torch.float32:
        from safetensors.torch import load_file, save_file

        path = tmp_path / "adapter_model.safetensors"
        save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path)
    lm = model.load(folder, device="cpu")
    lm.load_adapter(str(tmp_path))
    assert np.abs(lm.logits(IDS) - theirs(judge)).max() < 1e-4


def test_fresh_adapters_change_nothing_and_are_drawn_by_the_seed(folder):
    made, layers = network(folder, LORAS[1])
    plain = Network(model.load(folder, device=torch.device("cpu")).parameters, CONFIG)
    assert loss(made).item() == loss(plain).item()
    again, _ = network(folder, LORAS[1])
    other, _ = network(folder, LORAS[1], seed=1)
    for name in layers:
        a = made.get_submodule(name).adapter.a
        assert torch.equal(a, again.get_submodule(name).adapter.a)
        assert not torch.equal(a, other.get_submodule(name).adapter.a)
        bound = 1 / math.sqrt(a.shape[1])
        assert bound * 0.9 < a.abs().max() <= bound  # of 128 or more, the largest is near the bound
        # Of a uniform number the deviation is bound / sqrt(3); five of the estimate's own, 0.45 / sqrt(n) of it.
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 * 0.45 / math.sqrt(a.numel()))
    assert len({float(made.get_submodule(name).adapter.a.detach()[0, 0]) for name in layers}) == len(layers)
    assert {name for name, each in made.named_parameters() if each.requires_grad} == {
        f"{name}.adapter.{part}" for name in layers for part in "ab"
    }


def test_recomputed_blocks_give_the_same_gradients(folder):
    first, layers = trained(folder, LORAS[1])
    loss(first).backward()
    second, _ = trained(folder, LORAS[1])
    second.recompute = True
    loss(second).backward()
    for name in layers:
        assert torch.equal(first.get_submodule(name).adapter.a.grad, second.get_submodule(name).adapter.a.grad)


def test_merging_rounds_the_sum_once():
    lm = model.from_config(CONFIG, seed=3, device="cpu", dtype="float16")
    weight = lm.parameters["blocks.0.up.weight"].astype(np.float32)
    random = np.random.default_rng(0)
    adapter = LowRank(*(random.standard_normal(shape).astype(np.float32) for shape in ((2, 32), (128, 2))), 0.5)
    merge(lm.parameters, {"blocks.0.up": adapter})
    want = (weight + np.float32(0.5) * (adapter.b @ adapter.a)).astype(np.float16)
    assert (lm.parameters["blocks.0.up.weight"] == want).all()


def test_targets_are_layers_by_name_or_pattern():
    names = list(products(GPT2Config(n_layer=12)))
    assert Lora(targets=("qkv",)).layers(names) == [f"blocks.{layer}.qkv" for layer in range(12)]
    assert Lora().layers(products(LLAMA)) == [f"blocks.{layer}.{name}" for layer in range(3) for name in "qkv"]
    assert Lora(targets=("blocks.1.*",)).layers(names) == [f"blocks.1.{layer}" for layer in ALL]
    assert Lora(targets=("*",)).layers(names) == names
    assert Lora(targets=("down", "blocks.0.up", "blocks.0.d*")).layers(names)[:2] == ["blocks.0.up", "blocks.0.down"]
    with pytest.raises(ModelError, match=r"'blocks.\*.c_attn' matches nothing; there is blocks.\*"):
        Lora(targets=("c_attn",)).layers(names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank of adapters must be a whole number, 1 or more, got 0"),
        ({"rank": 2.5}, "got 2.5"),
        ({"alpha": 0}, "alpha of adapters must be a number above 0, got 0"),
        ({"alpha": math.nan}, "got nan"),
        ({"targets": ()}, "must be a list of patterns, got \\(\\)"),
        ({"targets": "qkv"}, "must be a list of patterns, got 'qkv'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ModelError, match=said):
        Lora(**options)


def test_a_rank_above_the_weights_is_refused(folder):
    with pytest.raises(ModelError, match=r"the rank of adapters is 33, and a weight is only \(96, 32\)"):
        network(folder, Lora(rank=33))


BAD_CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
    ({"use_dora": True}, "use_dora=true is not computed here"),
    ({"bias": "all"}, 'bias="all" is not computed here'),
    ({"rank_pattern": {"c_attn": 3}}, 'rank_pattern={"c_attn": 3} is not computed'),
    ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"] is not'),
    ({"key_of_tomorrow": 1}, "key_of_tomorrow=1 is not computed here"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not computed here"),
    ({"r": 3}, "wanted (3, 32)"),
    ({"r": 0}, "r must be a whole number from 1 to 1048576, got 0"),
    ({"r": 10**400}, "r must be a whole number from 1 to 1048576"),
    ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
]


@pytest.fixture
def adapter(folder, tmp_path):
    made, _ = trained(folder, LORAS[0])
    write_adapter(tmp_path, made.config, adapters(made), alpha=16)
    return tmp_path


@pytest.mark.parametrize(("change", "said"), BAD_CONFIGS)
def test_a_config_that_asks_for_more_is_refused(folder, adapter, change, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    lm = model.load(folder, device="cpu")
    before = lm.parameters["blocks.0.qkv.weight"].copy()
    with pytest.raises(CheckpointError) as fault:
        lm.load_adapter(adapter)
    assert said in str(fault.value)
    assert (lm.parameters["blocks.0.qkv.weight"] == before).all()


def test_tensors_that_do_not_fit_are_named(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second = list(tensors)[:2]

    def answer(changed):
        save_file(changed, path)
        with pytest.raises(CheckpointError) as fault:
            read_adapter(adapter, CONFIG)
        return str(fault.value)

    assert f"tensor {first} is F32 (8, 31), wanted (8, 32)" in answer(tensors | {first: np.ones((8, 31), np.float32)})
    refused = f"tensor {first} is F64 (8, 32), wanted (8, 32) of F32, F16, BF16"
    assert refused in answer(tensors | {first: tensors[first].astype(np.float64)})
    assert "blocks.0.qkv has one of its two tensors only" in answer({k: v for k, v in tensors.items() if k != second})
    assert "tensor base_model.model.lm_head.lora_A.weight is of no product" in answer(
        tensors | {"base_model.model.lm_head.lora_A.weight": np.ones((8, 32), np.float32)}
    )
    assert "there is no adapter in it" in answer({})
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(CheckpointError, match="adapter_model"):
        read_adapter(adapter, CONFIG)


def test_a_folder_without_an_adapter_is_refused(folder, tmp_path):
    lm = model.load(folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: there is no such file"):
        lm.load_adapter(tmp_path)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_adapter(blocked, CONFIG, {"blocks.0.qkv": LowRank(np.ones((1, 32)), np.ones((96, 1)), 1.0)}, alpha=1)


TEXTS = [" ".join(["And God said unto Moses", "Let there be light"][each % 2 :] * (each % 5 + 1)) for each in range(24)]
OPTIONS = {"context": 32, "batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "validation": 0.2}


def test_a_run_keeps_its_adapter_for_peft_and_for_ours(tmp_path):
    out = tmp_path / "out"
    lm = model.load("tiny-gpt2", device="cpu")
    untrained = lm.logits(IDS)
    options = {"lora_rank": 4, "lora_targets": ["qkv", "blocks.0.up"], "keep_adapter": True}
    lm.finetune(TEXTS, out=out, console=Console(quiet=True), **OPTIONS, **options)
    assert np.abs(lm.logits(IDS) - untrained).max() > 0.1
    base = model.load("tiny-gpt2", device="cpu")
    base.load_adapter(out)
    base.save(tmp_path / "merged")
    judge = peft_model(locate("tiny-gpt2"), out)
    # Logits of up to 20, six blocks: the roundings of two orders of summing.
    assert np.abs(lm.logits(IDS) - theirs(judge)).max() < 2e-4
    assert np.abs(base.logits(IDS) - theirs(judge)).max() < 2e-4
    assert not (out / "model.safetensors").exists()
    with pytest.raises(ModelError, match="no run to resume"):
        lm.finetune(TEXTS, out=out, resume=True, console=Console(quiet=True), **OPTIONS, **options)


def test_an_adapter_names_the_model_that_it_is_of_and_no_other(tmp_path):
    """Of a model that has been trained, or has another adapter in it, the folder that it came from is not the base."""
    lm, options = model.load("tiny-gpt2", device="cpu"), {"lora_rank": 2, "max_steps": 1, "keep_adapter": True}

    def named(lm, out):
        lm.finetune(TEXTS[:2], out=tmp_path / out, context=32, validation=0, console=Console(quiet=True), **options)
        return json.loads((tmp_path / out / "adapter_config.json").read_text())["base_model_name_or_path"]

    assert named(lm, "first") == str(locate("tiny-gpt2"))
    assert named(lm, "second") is None
    lm = model.load("tiny-gpt2", device="cpu")
    lm.load_adapter(tmp_path / "first")
    assert named(lm, "third") is None


def test_a_run_merges_its_adapter_where_it_is_not_kept(tmp_path):
    lm = model.load("tiny-gpt2", device="cpu")
    lm.finetune(TEXTS, out=tmp_path / "out", console=Console(quiet=True), **OPTIONS, lora_rank=2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert np.abs(lm.logits(IDS) - theirs(saved)).max() < 2e-4
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_rank": 4, "layers": "1"}, "choose layers by lora_targets"),
        ({"lora_rank": 4, "freeze": ["*"]}, "choose layers by lora_targets"),
        ({"keep_adapter": True}, "keep_adapter is of adapters, and there are none: give lora_rank"),
        ({"lora_targets": ["qkv"]}, "lora_targets is of adapters"),
        ({"lora_alpha": 16.0}, "lora_alpha is of adapters"),
        ({"lora_rank": 4, "lora_targets": ["c_attn"]}, "'blocks.*.c_attn' matches nothing"),
        ({"lora_rank": 0}, "rank of adapters must be a whole number"),
        ({"lora_rank": 4, "lora_targets": "qkv"}, "lora_targets must be a list, got 'qkv'"),
    ],
)
def test_a_run_refuses_what_it_cannot_do_before_it_writes(tmp_path, options, said):
    lm = model.load("tiny-gpt2", device="cpu")
    with pytest.raises(ModelError) as fault:
        lm.finetune(TEXTS, out=tmp_path / "out", console=Console(quiet=True), **options)
    assert said in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_generate_takes_an_adapter(folder, adapter, capsys, monkeypatch):
    def said(*arguments):
        monkeypatch.setattr("sys.argv", ["gpukernels", "generate", *arguments, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    code, output = said("And", "--adapter", str(adapter))
    assert (code, output.out) == (2, "")
    assert "lora_A.weight is F32 (8, 32), wanted (8, 256)" in output.err
