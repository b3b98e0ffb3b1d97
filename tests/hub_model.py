"""A model for the Hub of the tests, and the fixtures that put that Hub in the real one's place."""

import json

import numpy as np
import pytest
from fake_hub import FakeHub

from model.checkpoint import INDEX_NAME, WEIGHTS_NAME
from model.config import GPT2Config
from model.errors import HubError
from model.hub import fetch

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
save = pytest.importorskip("safetensors.numpy").save

NAME = "owner/tiny"
TOKEN = "hf_secretOfTheTests"
CONFIG = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, which the client takes for the real one, and an empty cache. What is patched is read at each call."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it has a request of its own, once a process
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def impatient(monkeypatch):
    """The client without its pauses between attempts, which add up to 23 s."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def tensors() -> dict[str, np.ndarray]:
    """A GPT-2 as small as it can be, in the names of Hugging Face."""
    random, width = np.random.default_rng(0), CONFIG.n_embd
    shapes = {"wte.weight": (CONFIG.vocab_size, width), "wpe.weight": (CONFIG.n_positions, width)}
    for layer in (f"h.{i}" for i in range(CONFIG.n_layer)):
        for part, inner, outer in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"{layer}.{part}.weight": (inner, outer), f"{layer}.{part}.bias": (outer,)}
        shapes |= {f"{layer}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def files(shards: int = 1, tokenizer: bool = True) -> dict[str, bytes]:
    """A model's repository, with what nobody should download beside it."""
    found = {
        "config.json": json.dumps(CONFIG.to_json()).encode(),
        "generation_config.json": b'{"do_sample": false}',
        "README.md": b"# tiny",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"PK\x03\x04",
        "tf_model.h5": b"h5",
        "flax_model.msgpack": b"msgpack",
        "onnx/decoder_model.onnx": b"onnx",
        "onnx/config.json": b"{}",
    }
    if tokenizer:
        found |= {"tokenizer.json": b'{"version": "1.0"}', "vocab.json": b'{"!": 0}', "merges.txt": b"#version: 0.2\n"}
    if shards == 1:
        return found | {WEIGHTS_NAME: save(tensors())}
    every, weight_map = list(tensors().items()), {}
    for i in range(shards):
        part = dict(every[i::shards])
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        found[shard] = save(part)
        weight_map |= dict.fromkeys(part, shard)
    return found | {INDEX_NAME: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"}


def refusal(name: str = NAME, **options) -> str:
    """The one line with which `fetch` refuses: about this model, and without the token."""
    with pytest.raises(HubError) as caught:
        fetch(name, **options)
    (line,) = str(caught.value).splitlines()
    assert name in line
    assert TOKEN not in line
    return line


def offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
