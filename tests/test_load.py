"""Weights into their places: casts, memory, `lm.parameters`, random weights, devices and dtypes."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import CONFIG, make, pack, tensors

import model
from model import device as devices
from model.checkpoint import WEIGHTS_NAME
from model.config import PRESETS
from model.device import choose_device, choose_dtype
from model.errors import CheckpointError, ConfigError, DeviceError, LoadNotice, ModelError
from model.gpt2 import slots
from model.load import BUNDLED, fill, locate, plan

WIDE = model.GPT2Config(vocab_size=8192, n_positions=4, n_embd=8, n_layer=1, n_head=1)


def bits_of(dtype: str) -> np.ndarray:
    """All 65536 numbers of a half-precision format, or as many float32 of every kind, as their bits."""
    if dtype != "F32":
        return np.arange(2**16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    edges = np.array(
        [0, -0.0, np.inf, -np.inf, 65504, 65519.996, 65520, -65520, 2**-24, 2**-25, 3e-8, 1e-45, 1 + 2**-11]
    )
    random[: edges.size] = edges.astype(np.float32).view(np.uint32)
    random[edges.size] = np.float32(np.nan).view(np.uint32)
    return random


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of a checkpoint's bits."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32) if dtype == "F32" else bits.view(np.float16).astype(np.float32)


def write_wide(folder: Path, dtype: str, values: dict[str, np.ndarray]) -> Path:
    """A model of 65536 numbers in `wte.weight`, with tensors of one dtype given by their bits."""
    make(folder, WIDE)
    header, data = {}, b""
    for name, array in values.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    (folder / WEIGHTS_NAME).write_bytes(pack(header, data))
    return folder


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("ignore::model.LoadNotice")
def test_casts_are_exact_or_rounded_to_nearest_for_every_kind_of_number(tmp_path, stored, dtype):
    bits = bits_of(stored)
    every = {name: np.resize(bits, array.shape) for name, array in tensors(WIDE).items()}
    folder = write_wide(tmp_path / "wide", stored, every)
    parameters = model.load(folder, device="cpu", dtype=dtype).parameters
    for name, turned in (("tokens.weight", False), ("blocks.0.qkv.weight", True), ("blocks.0.up.bias", False)):
        source = every[
            {"t": "wte.weight", "q": "h.0.attn.c_attn.weight", "u": "h.0.mlp.c_fc.bias"}[name.split(".")[-2][0]]
        ]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            wanted = widened(source, stored).astype(dtype)
        got = parameters[name].T if turned else parameters[name]
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        same = np.ascontiguousarray(got)[~np.isnan(wanted)].tobytes() == wanted[~np.isnan(wanted)].tobytes()
        assert same, name


@pytest.mark.parametrize(("stored", "finite"), [("F32", 65520.0), ("BF16", 2.0**17)])
def test_values_too_large_for_float16_are_counted_in_a_notice(tmp_path, stored, finite):
    every = {name: np.zeros(array.shape, np.float32) for name, array in tensors(WIDE).items()}
    every["wte.weight"].flat[[3, 40_000]] = finite, -finite
    every["h.0.mlp.c_fc.weight"][1, 2] = finite
    every["wte.weight"].flat[5] = np.inf
    every["wte.weight"].flat[6] = np.nan
    bits = {name: array.view(np.uint32) for name, array in every.items()}
    if stored == "BF16":
        bits = {name: (array >> 16).astype(np.uint16) for name, array in bits.items()}
    folder = write_wide(tmp_path / "wide", stored, bits)
    with pytest.warns(LoadNotice):
        lm = model.load(folder, device="cpu", dtype="float16")
    assert [notice.split(" ")[:2] for notice in lm.notices] == [["wte.weight:", "2"], ["h.0.mlp.c_fc.weight:", "1"]]
    assert all("too large for float16" in notice for notice in lm.notices)
    assert model.load(folder, device="cpu", dtype="float32").notices == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_larger_than_the_buffer_is_read_and_counted_whole(tmp_path, dtype):
    config = model.GPT2Config(vocab_size=300_001, n_positions=4, n_embd=8, n_layer=1, n_head=1)
    every = tensors(config)
    every["wte.weight"].flat[[0, -1]] = 1e6
    assert every["wte.weight"].nbytes > 2 * 4 * 2**20
    folder = make(tmp_path / "long", config, every)
    with warnings.catch_warnings(action="ignore", category=LoadNotice):
        lm = model.load(folder, device="cpu", dtype=dtype)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(lm.parameters["tokens.weight"], every["wte.weight"].astype(dtype))
    assert [notice[:13] for notice in lm.notices] == ["wte.weight: 2"] * (dtype == "float16")


# --- memory, and what happens while reading

_MEASURE = """
import sys
import model

def kilobytes(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))

before = kilobytes("VmRSS")
lm = model.load(sys.argv[1], device="cpu", dtype="float32")
print((kilobytes("VmHWM") - before) * 1024 / lm.parameters.nbytes, lm.parameters.nbytes)
print(*(float(lm.parameters[name].flat[-1]) for name in ("tokens.weight", "blocks.0.qkv.weight")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_float32_takes_the_memory_of_the_weights_and_a_tenth(tmp_path):
    config = model.GPT2Config(vocab_size=20_000, n_positions=64, n_embd=768, n_layer=4, n_head=12)
    pattern = np.random.default_rng(0).standard_normal(config.vocab_size * config.n_embd, np.float32)
    every = {slot.source: pattern[: slot.size].reshape(slot.stored_shape) for slot in slots(config)}
    folder = make(tmp_path / "large", config, every)
    ran = subprocess.run([sys.executable, "-c", _MEASURE, str(folder)], capture_output=True, text=True, check=True)
    grown, nbytes, *last = map(float, ran.stdout.split())
    assert nbytes > 150e6
    assert 0.9 < grown <= 1.10
    assert last == [pattern[-1], pattern[768 * 3 * 768 - 1]]


def test_progress_ends_at_the_bytes_of_the_weights():
    seen = []
    model.load(BUNDLED, device="cpu", progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.nbytes for entry in plan(locate(BUNDLED)).entries.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, dtype):
    folder = make(tmp_path / "tiny")
    planned = plan(folder)
    with open(folder / WEIGHTS_NAME, "r+b") as file:
        file.truncate(9000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ended inside tensor"):
        fill(planned, choose_device("cpu"), dtype)


def test_a_file_that_disappears_before_it_is_read_is_an_error(tmp_path):
    folder = make(tmp_path / "tiny")
    planned = plan(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        fill(planned, choose_device("cpu"), "float32")


def test_a_tokenizer_that_was_saved_with_padding_and_truncation_does_neither(tmp_path):
    folder = make(tmp_path / "tiny")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 5},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    wanted = model.load(folder, device="cpu").tokenizer.encode("cccc")
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert len(wanted) == 4
    assert model.load(folder, device="cpu").tokenizer.encode("cccc") == wanted


# --- parameters


@pytest.fixture
def lm(tmp_path):
    return model.load(make(tmp_path / "tiny"), device="cpu")


def test_parameters_are_a_mapping_whose_blocks_are_the_same_arrays(lm):
    parameters = lm.parameters
    assert len(parameters) == len(list(parameters)) == 2 + 12 * CONFIG.n_layer + 2
    assert "blocks.1.qkv.weight" in parameters
    assert "blocks.2.qkv.weight" not in parameters
    assert parameters.blocks[1]["qkv.weight"] is parameters["blocks.1.qkv.weight"]
    assert parameters.root["norm.bias"] is parameters["norm.bias"]
    assert parameters["blocks.1.qkv.weight"].shape == (24, 8)
    assert parameters.count == sum(array.size for array in parameters.values())
    assert parameters.nbytes == 4 * parameters.count


def test_assigning_copies_into_the_parameters_own_memory(lm):
    array, before = lm.parameters["positions.weight"], lm.logits([1, 2])
    value = np.zeros((16, 8), np.float32)
    lm.parameters["positions.weight"] = value
    assert lm.parameters["positions.weight"] is array
    value += 1
    assert not array.any()
    assert np.abs(lm.logits([1, 2]) - before).max() > 1e-6


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (np.zeros((8, 16), np.float32), ValueError, r"positions\.weight: must have the shape \(16, 8\), got \(8, 16\)"),
        (np.zeros((1, 8), np.float32), ValueError, "shape"),
        (np.zeros((16, 8)), TypeError, r"positions\.weight: must have the dtype float32, got float64"),
        (np.zeros((16, 8), np.float16), TypeError, "dtype"),
        ([[0.0] * 8] * 16, TypeError, r"positions\.weight: must be a numpy\.ndarray, got builtins\.list"),
        (0.0, TypeError, "float"),
    ],
)
def test_assigning_another_shape_dtype_or_kind_is_refused_and_changes_nothing(lm, value, error, says):
    before = lm.parameters["positions.weight"].copy()
    with pytest.raises(error, match=says):
        lm.parameters["positions.weight"] = value
    np.testing.assert_array_equal(lm.parameters["positions.weight"], before)


def test_parameters_are_neither_added_nor_removed(lm):
    with pytest.raises(KeyError, match="no such parameter"):
        lm.parameters["wte.weight"] = np.zeros((258, 8), np.float32)
    with pytest.raises(TypeError, match="cannot be removed"):
        del lm.parameters["norm.bias"]
    with pytest.raises(KeyError):
        lm.parameters["wte.weight"]


# --- random weights


def test_a_seed_gives_the_same_random_weights_and_another_seed_others():
    some, same, others = (model.from_config(CONFIG, seed=seed, device="cpu").parameters for seed in (7, 7, 8))
    for name, array in some.items():
        np.testing.assert_array_equal(array, same[name])
        if array.ndim > 1:
            assert not np.array_equal(array, others[name]), name


def test_random_weights_are_spread_as_gpt2s_were():
    config = model.GPT2Config(vocab_size=3000, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    parameters = model.from_config(config, seed=0, device="cpu").parameters
    for name, array in parameters.items():
        if array.ndim == 1:
            assert (array == name.endswith(".weight")).all()
        else:
            spread = 0.01 if ".projection." in name or ".down." in name else 0.02
            assert abs(array.mean()) < 0.1 * spread
            assert array.std() == pytest.approx(spread, rel=0.05)


def test_random_weights_are_the_same_numbers_on_torch():
    torch = pytest.importorskip("torch")
    ours = model.from_config(CONFIG, seed=3, device="cpu").parameters
    theirs = model.from_config(CONFIG, seed=3, device=torch.device("cpu"), dtype="float32").parameters
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), array)


def test_a_preset_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"'gpt3' is not a preset.*gpt2-xl"):
        model.from_config("gpt3")
    assert {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"} < set(PRESETS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_head": 3}, "n_head=3 must divide n_embd=8"),
        ({"n_layer": 0}, "n_layer must be an integer"),
        ({"n_embd": np.int64(8)}, "n_embd must be an integer"),
        ({"activation_function": "mish"}, "activation_function must be one of"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number"),
        ({"eos_token_id": "a"}, "eos_token_id must be a token id"),
    ],
    ids=str,
)
def test_a_config_that_no_file_could_have_is_refused_by_name(monkeypatch, change, says):
    monkeypatch.setattr(model.loading, "fill_random", None)  # nothing is allocated
    with pytest.raises(ConfigError, match=says):
        model.from_config(replace(CONFIG, **change))


@pytest.mark.parametrize("config", [CONFIG.to_json(), None, Path("gpt2")], ids=str)
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ConfigError, match="config must be a preset's name, a GPT2Config or a LlamaConfig"):
        model.from_config(config)


@pytest.mark.parametrize("seed", [-1, "1", 1.5, True])
def test_a_seed_that_cannot_be_is_refused(seed):
    with pytest.raises(ModelError, match="seed must be a whole number, 0 or more"):
        model.from_config(CONFIG, seed=seed, device="cpu")


# --- devices and dtypes


def test_float16_on_numpy_stores_half_and_computes_float32(tmp_path):
    folder = make(tmp_path / "tiny")
    half, full = (model.load(folder, device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    assert half.parameters.nbytes * 2 == full.parameters.nbytes
    assert half.logits([1, 2, 3]).dtype == np.float32
    np.testing.assert_allclose(half.logits([1, 2, 3]), full.logits([1, 2, 3]), atol=0.02)


@pytest.mark.parametrize(
    ("visible", "found", "why"),
    [
        (None, True, "no NVIDIA driver"),
        (0, True, "sees no GPU"),
        (1, False, "torch is not installed: pip install"),
    ],
)
def test_cuda_that_is_not_there_is_refused_with_the_reason(monkeypatch, visible, found, why):
    monkeypatch.setattr(devices, "_driver_devices", lambda: visible)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: found or None)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=f"device '{name}' is not there: .*{why}"):
            model.load(BUNDLED, device=name)
    assert choose_device("auto").name == "cpu"


def test_a_torch_without_cuda_is_the_reason_where_the_driver_sees_a_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    monkeypatch.setattr(devices, "_driver_devices", lambda: 1)
    with pytest.raises(DeviceError, match="was built without CUDA"):
        model.load(BUNDLED, device=torch.device("cuda"))


@pytest.mark.parametrize(
    "name",
    [
        "tpu",
        "CPU",
        "",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1:2",
        "cpu:0",
        None,
        0,
        ["cpu"],
        *map(torch.device, ("meta", "mps")),
    ],
)
def test_a_device_that_does_not_exist_is_refused(monkeypatch, name):
    monkeypatch.setattr(devices, "_driver_devices", lambda: None)
    with pytest.raises(DeviceError, match="device "):
        model.load(BUNDLED, device=name)


@pytest.mark.parametrize("name", ["int8", "F16", "fp16", "float64", "", None, 16, np.float64, np.dtype("int32")])
def test_a_dtype_that_is_not_for_weights_is_refused(name):
    with pytest.raises(DeviceError, match="dtype must be float32, float16, bfloat16, or auto"):
        model.load(BUNDLED, device="cpu", dtype=name)


def test_bfloat16_on_numpy_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DeviceError, match="dtype bfloat16 needs a torch device"):
        model.load(tmp_path / "nothing", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16")])
def test_a_dtype_may_be_a_name_or_numpys(dtype):
    assert choose_dtype(dtype, choose_device("cpu")) == "float16"


def test_auto_is_float32_on_the_cpu_whatever_the_file_has():
    assert plan(locate(BUNDLED)).stored == "F16"
    assert model.load(BUNDLED, device="cpu").parameters.dtype == "float32"
