"""Kinds of damage to a model's folder: what each does, and what the message about it must say.

`make` writes a GPT-2 as small as it can be; `DAMAGE` maps the name of a kind to what it does to such a folder.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.checkpoint import INDEX_NAME, WEIGHTS_NAME
from model.config import GPT2Config
from model.gpt2 import slots

CONFIG = GPT2Config(vocab_size=258, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=257, eos_token_id=257)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"

Do = Callable[[Path], Any]


@dataclass(frozen=True)
class Damage:
    file: str  # that the message names; "" is the folder
    says: str  # what is in the message
    do: Do


def tensors(config: GPT2Config = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of a checkpoint, products (in, out), under their bare names."""
    random = np.random.default_rng(seed)
    return {slot.source: random.standard_normal(slot.stored_shape, np.float32) / 4 for slot in slots(config)}


def make(folder: Path, config: GPT2Config = CONFIG, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes config, weights, and a tokenizer that knows bytes and "ab"; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    save_file(tensors(config) if weights is None else weights, folder / WEIGHTS_NAME)
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def pack(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of this header, which may be bytes already, and these data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def shard(folder: Path) -> Path:
    """Turns the single file into two shards and an index."""
    names = sorted(every := load_file(folder / WEIGHTS_NAME))
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: every[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS_NAME).unlink()
    return folder


def _write(file: str, content: bytes) -> Do:
    return lambda folder: (folder / file).write_bytes(content)


def _cut(file: str) -> Do:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-20])


def _weights(change: Callable[[bytes], bytes]) -> Do:
    return lambda folder: (folder / WEIGHTS_NAME).write_bytes(change((folder / WEIGHTS_NAME).read_bytes()))


def _header(change: Callable[[dict], Any]) -> Do:
    """Changes the header in place and leaves the data alone."""

    def rewrite(content: bytes) -> bytes:
        header, data = unpack(content)
        change(header)
        return pack(header, data)

    return _weights(rewrite)


def _entry(**changes: Any) -> Do:
    """Changes what the header says of one tensor of 24 numbers, the first in the file."""
    return _header(lambda header: header[_BIAS].update(changes))


def _last(first: int, second: int, **changes: Any) -> Do:
    """Moves the two ends of the last tensor in the file."""

    def change(header: dict) -> None:
        begin, end = header["wte.weight"]["data_offsets"]
        header["wte.weight"].update(changes, data_offsets=[begin + first, end + second])

    return _header(change)


def _tensor(name: str, *shape: int, dtype: Any = np.float32) -> Do:
    """Adds or replaces a tensor; without a shape, removes it."""

    def do(folder: Path) -> None:
        every = load_file(folder / WEIGHTS_NAME)
        every.pop(name, None)
        save_file(every | ({name: np.zeros(shape, dtype)} if shape else {}), folder / WEIGHTS_NAME)

    return do


def _rename(name: str) -> Do:
    return _header(lambda header: header.update({name: header.pop("wpe.weight")}))


def _index(change: Callable[[dict], Any]) -> Do:
    """Shards the model and changes the weight map, in place."""

    def do(folder: Path) -> None:
        document = json.loads((shard(folder) / INDEX_NAME).read_text())
        change(document["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(document))

    return do


def _shard_named(name: str) -> Do:
    return _index(lambda names: names.update(dict.fromkeys(names, name)))


def _sharded(then: Do) -> Do:
    return lambda folder: then(shard(folder))


def _in_both_shards(folder: Path) -> None:
    every = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1])
    save_file(every, folder / SHARDS[1])


def _remove(*files: str) -> Do:
    return lambda folder: [(folder / file).unlink() for file in files]


def _only(file: str) -> Do:
    return lambda folder: (folder / WEIGHTS_NAME).rename(folder / file)


def _config(**changes: Any) -> Do:
    return lambda folder: edit_config(folder, **changes)


def _directory(file: str) -> Do:
    return lambda folder: ((folder / file).unlink(missing_ok=True), (folder / file).mkdir())


def _loop(file: str) -> Do:
    """A link to itself: a file that nobody can read, root neither."""
    return lambda folder: ((folder / file).unlink(missing_ok=True), (folder / file).symlink_to(file))


def _vocabulary(vocab: Any, merges: bytes | None) -> Do:
    """GPT-2's own pair of files in place of tokenizer.json."""

    def do(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(vocab))
        if merges is not None:
            (folder / "merges.txt").write_bytes(merges)

    return do


def _large_header(folder: Path) -> None:
    """A header that is as long as it says, of zeros that take no room."""
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(10**8 + 9)


def _panic(folder: Path) -> None:
    """A prefix longer than a token: Rust's panics are no `Exception` in Python."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["continuing_subword_prefix"] = "####"
    path.write_text(json.dumps(document))


_BIAS, _PRODUCT = "h.0.attn.c_attn.bias", "h.0.attn.c_attn.weight"
_DEEP = b"[" * 100_000 + b"]" * 100_000
_LONG = b'{"n_layer": ' + b"9" * 5000 + b"}"
_BAD, _OUT = "the header is damaged", "it must name a .safetensors file beside it"

_WEIGHTS: dict[str, tuple[str, Do]] = {
    "an empty file": ("0 bytes are too few", _weights(lambda _: b"")),
    "seven bytes": ("7 bytes are too few", _weights(lambda content: content[:7])),
    "a header of 2**63 bytes": (f"{2**63} bytes", _weights(lambda content: (2**63).to_bytes(8, "little") + content)),
    "a header over 100 MB": ("100000000 is the most", _large_header),
    "a header longer than the file": ("truncated", _weights(lambda content: content[:100])),
    "a cut inside the data": ("truncated: tensor", _weights(lambda content: content[:-100])),
    "bytes behind the data": ("5 bytes follow the last tensor", _weights(lambda content: content + b"12345")),
    "no header": (_BAD, _weights(lambda _: pack(b""))),
    "a header that is not UTF-8": (_BAD, _weights(lambda _: pack(b'{"\xff\xfe": 1}'))),
    "a header that is not JSON": (_BAD, _weights(lambda _: pack(b"{'wte.weight': 1}"))),
    "a header that is a list": ("must be an object", _weights(lambda _: pack([1, 2]))),
    "a header nested too deep": (_BAD, _weights(lambda _: pack(_DEEP))),
    "a header with a long number": (_BAD, _weights(lambda _: pack(_LONG))),
    "a tensor twice": ("'a' stands in it twice", _weights(lambda _: pack(b'{"a": {}, "a": {}}'))),
    "metadata that are numbers": ("__metadata__ must map", _header(lambda h: h.update(__metadata__={"a": 1}))),
    "metadata that are a list": ("__metadata__ must map", _header(lambda h: h.update(__metadata__=["a"]))),
    "an entry that is a number": ("must have dtype", _header(lambda h: h.update(a=1))),
    "an entry without a shape": ("must have dtype", _header(lambda h: h.update(a={"dtype": "F32"}))),
    "an entry with another key": ("must have dtype", _entry(code="import os")),
    "an unknown dtype": ("unknown dtype 'F31'", _entry(dtype="F31")),
    "a dtype that is a number": ("unknown dtype 32", _entry(dtype=32)),
    "a dtype that is a list": ("unknown dtype ['F32']", _entry(dtype=["F32"])),
    "a shape below 0": ("the shape [-1, 24]", _entry(shape=[-1, 24])),
    "a shape of fractions": ("the shape [24.0]", _entry(shape=[24.0])),
    "a shape of true": ("the shape [True, 24]", _entry(shape=[True, 24])),
    "a shape of text": ("the shape '24'", _entry(shape="24")),
    "a shape beyond 2**63": (f"the shape [{2**63}]", _entry(shape=[2**63])),
    "a shape whose product overflows": ("cannot have 96 bytes", _entry(shape=[2**62, 2**62])),
    "a shape of 5000 numbers": (_BIAS, _entry(shape=[2**62] * 5000)),
    "a shape that is not the size": ("cannot have 96 bytes", _entry(shape=[23])),
    "half a byte too many": ("cannot have 96 bytes", _entry(dtype="F4", shape=[193])),
    "no offsets": ("the data_offsets None", _entry(data_offsets=None)),
    "three offsets": ("the data_offsets [0, 48, 96]", _entry(data_offsets=[0, 48, 96])),
    "offsets of fractions": ("the data_offsets [0.0, 96.0]", _entry(data_offsets=[0.0, 96.0])),
    "offsets reversed": ("the data_offsets [96, 0]", _entry(data_offsets=[96, 0])),
    "offsets that overlap": ("wte.weight overlaps the tensor before it", _last(-4, -4)),
    "offsets with a hole": ("wte.weight leaves a hole before it", _last(4, 4)),
    "offsets past the end": ("truncated: tensor wte.weight ends", _last(0, 4, shape=[258 * 8 + 1])),
    "a Git LFS pointer": ("git lfs pull", _weights(lambda _: LFS_POINTER)),
    "a web page": ("web page", _weights(lambda _: b"\n<!DOCTYPE html><html><body>Sign in, please.</body></html>")),
    "a zip": ("a pickle under another name", _weights(lambda _: b"PK\x03\x04" + bytes(100))),
    "GGUF": ("this is a GGUF file", _weights(lambda _: b"GGUF\x03\0\0\0" + bytes(100))),
    "a pickle": ("a pickle under another name", _weights(lambda _: b"\x80\x04\x95" + bytes(100))),
    "weights that are a folder": ("cannot be read: Is a directory", _directory(WEIGHTS_NAME)),
    "weights that are a loop of links": ("cannot be read", _loop(WEIGHTS_NAME)),
}

_FOLDER: dict[str, tuple[str, Do]] = {
    "a tensor missing": ("tensor ln_f.bias (8,) is missing", _tensor("ln_f.bias")),
    "a tensor too many": ("tensor extra.weight (3,) is unexpected", _tensor("extra.weight", 3)),
    "a layer too many": ("tensor h.2.ln_1.bias (8,) is unexpected", _tensor("h.2.ln_1.bias", 8)),
    "another head": ("tensor score.weight (2, 8) is unexpected", _tensor("score.weight", 2, 8)),
    "a wrong shape": ("wpe.weight is (15, 8), the config wants (16, 8)", _tensor("wpe.weight", 15, 8)),
    "a product the other way round": ("looks transposed", _tensor(_PRODUCT, 24, 8)),
    "integers": ("wpe.weight has the dtype I64", _tensor("wpe.weight", 16, 8, dtype=np.int64)),
    "double precision": ("wpe.weight has the dtype F64", _tensor("wpe.weight", 16, 8, dtype=np.float64)),
    "a tensor under two prefixes": ("wpe.weight is there twice", _tensor("transformer.wpe.weight", 16, 8)),
    "a name with a line break": ("unexpected", _rename("wpe\nok: all is well")),
    "a name with a terminal's commands": ("unexpected", _rename("wpe\x1b[2J\x07")),
    "a name that cannot be printed": ("unexpected", _rename("\ud800")),
    "a name of 100,000 letters": ("unexpected", _rename("w" * 100_000)),
    "only a .bin": ("pytorch_model.bin), which can run code", _only("pytorch_model.bin")),
    "only a .pt": ("model.pt), which can run code", _only("model.pt")),
    "no weights": ("no weights", _remove(WEIGHTS_NAME)),
    "shards without an index": ("several safetensors files", _sharded(_remove(INDEX_NAME))),
}

_INDEX: dict[str, tuple[str, Do]] = {
    "an index without its shards": ("is missing from the folder", _sharded(_remove(*SHARDS))),
    "a shard missing": (f"{SHARDS[1]} is missing from the folder", _sharded(_remove(SHARDS[1]))),
    "an index that is not JSON": ("not valid JSON", _sharded(_write(INDEX_NAME, b"{'weight_map': {}}"))),
    "an index that is a list": ("must hold a JSON object", _sharded(_write(INDEX_NAME, b"[]"))),
    "an index without a map": ("weight_map must be", _sharded(_write(INDEX_NAME, b"{}"))),
    "an index with an empty map": ("weight_map must be", _index(lambda names: names.clear())),
    "an index whose map is a list": ("weight_map must be", _sharded(_write(INDEX_NAME, b'{"weight_map": ["a"]}'))),
    "a shard that is a number": ("weight_map must be", _index(lambda names: names.update({_BIAS: 7}))),
    "a tensor in the other shard": (f"says {_BIAS} is in {SHARDS[1]}", _index(lambda n: n.update({_BIAS: SHARDS[1]}))),
    "a tensor in no shard": ("says extra is in", _index(lambda names: names.update(extra=SHARDS[0]))),
    "a tensor that is not in the index": (f"does not list {_BIAS}", _index(lambda names: names.pop(_BIAS))),
    "a shard on the way up": (_OUT, _shard_named("../model.safetensors")),
    "a shard on the way down and up": (_OUT, _shard_named("a/../../model.safetensors")),
    "a shard of the root": (_OUT, _shard_named("/etc/model.safetensors")),
    "a shard of another drive": (_OUT, _shard_named("C:\\model.safetensors")),
    "a shard with a backslash": (_OUT, _shard_named("..\\model.safetensors")),
    "a shard with a NUL": (_OUT, _shard_named("model\0.safetensors")),
    "a shard with a line break": (_OUT, _shard_named("model.safetensors\n")),
    "a shard that is a pickle": (_OUT, _shard_named("model.bin")),
    "a shard without a name": (_OUT, _shard_named("")),
    "a shard with a long name": (".safetensors", _shard_named("m" * 300 + ".safetensors")),
}

_SHARD: dict[str, tuple[str, Do]] = {
    "a shard cut off": ("truncated", _sharded(_cut(SHARDS[1]))),
    "a shard that is a Git LFS pointer": ("git lfs pull", _sharded(_write(SHARDS[1], LFS_POINTER))),
    "a tensor in two shards": (f"tensors are in other files too: {_BIAS} in {SHARDS[0]}", _sharded(_in_both_shards)),
}

_CONFIG: dict[str, tuple[str, Do]] = {
    "no config": ("there is no such file", _remove("config.json")),
    "an empty config": ("the file is empty", _write("config.json", b"")),
    "a config cut off": ("not valid JSON", _cut("config.json")),
    "a config that is not UTF-8": ("not valid JSON", _write("config.json", b'{"a": "\xff"}')),
    "a config that is a list": ("must hold a JSON object, got [1]", _write("config.json", b"[1]")),
    "a config that is null": ("must hold a JSON object", _write("config.json", b"null")),
    "a config nested too deep": ("not valid JSON", _write("config.json", b'{"a": ' + _DEEP + b"}")),
    "a config with a long number": ("not valid JSON", _write("config.json", _LONG)),
    "a config of 17 MB": ("bytes, more than", _write("config.json", b" " * 17 * 2**20)),
    "a config that is a folder": ("cannot be read: Is a directory", _directory("config.json")),
    "a config that is a loop of links": ("cannot be read", _loop("config.json")),
    "another architecture": ('got "llama"', _config(model_type="llama")),
    "no architecture": ("got null", _config(model_type=None)),
    "an architecture that is a list": ("model_type must be", _config(model_type=["gpt2"])),
    "heads that do not divide the width": ("n_head=3 must divide n_embd=8", _config(n_head=3)),
    "two names of the width that differ": ("hidden_size=9 contradicts n_embd=8", _config(hidden_size=9)),
    "an activation of 100,000 letters": ("activation_function must be", _config(activation_function="g" * 100_000)),
    "no layers": ("n_layer must be", _config(n_layer=0)),
    "a width below 0": ("n_embd must be", _config(n_embd=-8)),
    "a vocabulary of 1e9": ("vocab_size must be", _config(vocab_size=1e9)),
    "a thousand million positions": ("n_positions must be", _config(n_positions=10**9)),
    "heads as text": ("n_head must be", _config(n_head="2")),
    "heads that are true": ("n_head must be", _config(n_head=True)),
    "heads that are null": ("n_head must be", _config(n_head=None)),
    "an infinite feed-forward": ("n_inner must be", _config(n_inner=math.inf)),
    "an epsilon that is no number": ("layer_norm_epsilon must be", _config(layer_norm_epsilon=math.nan)),
    "a switch as text": ("scale_attn_weights must be", _config(scale_attn_weights="true")),
    "an end of text as text": ("eos_token_id must be", _config(eos_token_id=["257"])),
    "a start of text below 0": ("bos_token_id must be", _config(bos_token_id=-1)),
    "an unknown activation": ("activation_function must be", _config(activation_function="swiglu")),
    "cross-attention": ("add_cross_attention=true is refused", _config(add_cross_attention=True)),
    "quantized weights": ("quantization_config=", _config(quantization_config={"bits": 4})),
}

_TOKENIZER: dict[str, tuple[str, Do]] = {
    "an empty tokenizer": ("not a tokenizer", _write("tokenizer.json", b"")),
    "a tokenizer cut off": ("not a tokenizer", _cut("tokenizer.json")),
    "a tokenizer that is an empty object": ("not a tokenizer", _write("tokenizer.json", b"{}")),
    "a tokenizer that is a list": ("not a tokenizer", _write("tokenizer.json", b"[]")),
    "a tokenizer that is not UTF-8": ("not a tokenizer", _write("tokenizer.json", b"\xff\xfe\x00")),
    "a tokenizer that is a Git LFS pointer": ("a Git LFS pointer", _write("tokenizer.json", LFS_POINTER)),
    "a tokenizer that its library panics on": ("not a tokenizer", _panic),
    "a tokenizer that is a folder": ("", _directory("tokenizer.json")),
    "a tokenizer that is a loop of links": ("", _loop("tokenizer.json")),
}

_VOCABULARY: dict[str, tuple[str, str, Do]] = {
    "a vocabulary without merges": ("merges.txt", "", _vocabulary({"a": 0}, None)),
    "a vocabulary that is a list": ("vocab.json", "must hold a JSON object", _vocabulary(["a"], b"")),
    "a vocabulary of texts": ("vocab.json", "", _vocabulary({"a": "0"}, b"")),
    "merges that are not UTF-8": ("merges.txt", "", _vocabulary({"a": 0}, b"\xff\xfe\n")),
    "merges of three": ("merges.txt", "", _vocabulary({"a": 0}, b"a a a\n")),
    "merges of unknown symbols": ("merges.txt", "", _vocabulary({"a": 0}, b"a b\n")),
}

_GENERATION: dict[str, tuple[str, Do]] = {
    "a generation config cut off": ("not valid JSON", _write("generation_config.json", b'{"eos_token_id": 5')),
    "a generation config that is a list": ("must hold a JSON object", _write("generation_config.json", b"[]")),
    "a generation config with text": (
        "eos_token_id must be",
        _write("generation_config.json", b'{"eos_token_id": "5"}'),
    ),
    "a generation config that is a folder": ("", _directory("generation_config.json")),
}

DAMAGE: dict[str, Damage] = {
    **{kind: Damage(WEIGHTS_NAME, *how) for kind, how in _WEIGHTS.items()},
    **{kind: Damage("", *how) for kind, how in _FOLDER.items()},
    **{kind: Damage(INDEX_NAME, *how) for kind, how in _INDEX.items()},
    **{kind: Damage(SHARDS[1], *how) for kind, how in _SHARD.items()},
    **{kind: Damage("config.json", *how) for kind, how in _CONFIG.items()},
    **{kind: Damage("tokenizer.json", *how) for kind, how in _TOKENIZER.items()},
    **{kind: Damage(*how) for kind, how in _VOCABULARY.items()},
    **{kind: Damage("generation_config.json", *how) for kind, how in _GENERATION.items()},
}
