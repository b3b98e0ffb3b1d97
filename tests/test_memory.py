"""The ledger: what is predicted is what is allocated and measured, and what will not fit is refused."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from damage import CONFIG, make

import model
from model import room
from model.decoder import Decoder
from model.device import choose_device
from model.errors import ContextError, ModelError, OutOfMemoryError
from model.footprint import footprint
from model.gpt2_config import PRESETS
from model.graph import filled_up, prompt_sizes
from model.load import BUNDLED
from model.memory import LOADING, largest, logits_needs, predict, weight_bytes

PUBLISHED = {"gpt2": (498e6, 249e6), "gpt2-medium": (1.42e9, 0.71e9), "gpt2-large": (3.10e9, 1.55e9)}
PUBLISHED["gpt2-xl"] = (6.23e9, 3.12e9)

LLAMA = model.LlamaConfig(
    vocab_size=5001,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
MISTRAL = dataclasses.replace(LLAMA, model_type="mistral", sliding_window=100)
SMALL = model.GPT2Config(vocab_size=5001, n_positions=512, n_embd=256, n_layer=6, n_head=4)
PLACES = ("numpy", "torch", "cuda")


# --- what is predicted


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_the_presets_are_the_published_ones(name):
    for dtype, nbytes in zip(("float32", "float16"), PUBLISHED[name], strict=True):
        assert weight_bytes(PRESETS[name], dtype) == pytest.approx(nbytes, rel=0.01)


@pytest.mark.parametrize("config", [CONFIG, SMALL, dataclasses.replace(SMALL, tie_word_embeddings=False)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_and_cache_are_the_bytes_that_are_allocated(config, dtype):
    lm = model.from_config(config, device="cpu", dtype=dtype)
    ledger = lm.memory(batch=3, context=11).predicted
    (memory,) = {id(array.base): array.base for array in lm.parameters.values()}.values()
    assert ledger.weights == memory.nbytes
    cache = Decoder(lm.parameters, config, rows=3, capacity=11).cache
    assert ledger.kv_cache == cache.keys.nbytes + cache.values.nbytes
    assert lm.memory().predicted == predict(config, dtype, "numpy", context=config.n_positions)


def test_on_torch_keys_and_values_have_the_dtype_of_the_weights_and_on_cuda_room_for_every_position():
    for dtype, width in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        found = [predict(PRESETS["gpt2"], dtype, place, batch=8, context=256).kv_cache for place in PLACES]
        assert found == [2 * 12 * 8 * tokens * 768 * each for tokens, each in ((256, 4), (256, width), (1024, width))]
    wide = dataclasses.replace(SMALL, n_embd=1028, n_head=4)  # heads of 257 have no kernel, and are not captured
    assert predict(wide, "float16", "cuda", context=2).kv_cache == 2 * 6 * 2 * 1028 * 2


@pytest.mark.parametrize("context", [1, 100, 128, 500, 1024])
def test_captured_prompts_are_counted_as_they_are_filled_up_each_with_its_logits(context):
    config, width = PRESETS["gpt2"], 2
    filled = min(size for size in (16, 32, 64, 128, 256, 512, 1024) if size >= context)
    graphs = len([size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= filled])
    ledger = predict(config, "float16", "cuda", batch=3, context=context)
    assert ledger.activations == filled * (7 + 4) * 768 * width
    assert ledger.logits == (3 + graphs) * 50304 * width
    assert predict(config, "float16", "torch", batch=3, context=context).logits == 3 * 50304 * width
    # All tokens at once are not filled up.
    assert logits_needs(config, "float16", "cuda", 1, 5) == {
        "activations": 5 * 11 * 768 * width,
        "logits": 5 * 50304 * 2 * width,
    }


def test_the_decoder_captures_the_prompts_that_the_ledger_counts():
    assert prompt_sizes(1, 1024) == [16]
    assert prompt_sizes(17, 1024) == [16, 32]
    assert prompt_sizes(40, 40) == [16, 32, 40]
    assert prompt_sizes(7, 7) == [7]
    assert prompt_sizes(3000, 4096) == [16, 32, 64, 128, 256, 512, 1024, 2048]
    assert prompt_sizes(1500, 1500) == [16, 32, 64, 128, 256, 512, 1024, 1500]
    for tokens in range(1, 300):
        assert filled_up(tokens, 300) in prompt_sizes(tokens, 300)
        assert max(prompt_sizes(tokens, 300)) == filled_up(tokens, 300)


@pytest.mark.parametrize("place", PLACES)
def test_more_rows_tokens_and_bytes_a_number_take_more(place):
    peak = predict(SMALL, "float16", place, batch=2, context=100).peak
    assert predict(SMALL, "float16", place, batch=3, context=100).peak > peak
    assert predict(SMALL, "float16", place, batch=2, context=200).peak > peak
    assert predict(SMALL, "float16", place, batch=2, context=100, head=True).peak > peak
    assert predict(SMALL, "float32", place, batch=2, context=100).peak > peak


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nbytes", [30_000_000, 80_000_000, 10**9])
def test_the_largest_that_fits_does_and_one_more_does_not(place, nbytes):
    ledger = predict(SMALL, "float32", place, batch=2, context=300)
    batch, context = largest(ledger, SMALL, nbytes)
    for rows, tokens, more in ((batch, 300, (1, 0)), (2, context, (0, 1))):
        if rows and tokens:
            assert predict(SMALL, "float32", place, batch=rows, context=tokens).peak <= nbytes
        if tokens < 512:
            again = predict(SMALL, "float32", place, batch=rows + more[0], context=tokens + more[1])
            assert again.peak > nbytes
    assert (batch > 0) == (predict(SMALL, "float32", place, context=300).peak <= nbytes)


# --- what is measured

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("config", "dtype", "batch", "context"),
    [
        (PRESETS["gpt2"], "float32", 1, 256),
        (PRESETS["gpt2"], "float16", 2, 64),
        (SMALL, "float32", 8, 512),
        (SMALL, "float32", 1, 16),
        (SMALL, "float32", 1, 1),
        (LLAMA, "float32", 1, 1000),
        (LLAMA, "float16", 8, 64),
    ],
)
def test_resident_memory_grows_as_predicted_within_a_twentieth(config, dtype, batch, context):
    predicted = predict(config, dtype, "numpy", batch=batch, context=context)
    measured = footprint(config, choose_device("cpu"), predicted)
    assert measured.peak == pytest.approx(predicted.peak, rel=0.05)
    assert measured.weights == pytest.approx(predicted.weights, rel=0.05, abs=2e6)
    assert measured.peak >= measured.loading >= measured.weights


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [LLAMA, MISTRAL, SMALL], ids=["llama", "mistral", "gpt2"])
def test_plain_torch_is_predicted_without_scores(config, dtype):
    predicted = predict(config, dtype, "torch")
    assert predicted.workspace < 22 * 10**6 + 3 * 4 * config.n_head * config.n_positions**2
    measured = footprint(config, choose_device(torch.device("cpu")), predicted)
    assert 0.8 * predicted.peak < measured.peak < 1.1 * predicted.peak


def test_all_logits_of_plain_torch_need_a_mask_where_a_window_hides_keys():
    config = dataclasses.replace(MISTRAL, intermediate_size=8)
    mask = 5 * 1000 * 1000
    for window, masks in ((None, 0), (1000, 0), (999, 1)):
        config = dataclasses.replace(config, sliding_window=window)
        needs = logits_needs(config, "float32", "torch", 2, 1000)["workspace"]
        assert needs == 22 * 10**6 + max(masks * mask, int(4.5 * 2000 * 8 * 4))


def test_grouped_queries_have_their_scores_side_by_side():
    """In NumPy, which multiplies with a key-value head once: 8 / 2 heads of 128 queries and 1000 keys."""
    alone = dataclasses.replace(LLAMA, num_key_value_heads=8)
    more = predict(LLAMA, "float32", "numpy", context=1000).workspace
    assert more - predict(alone, "float32", "numpy", context=1000).workspace == 3 * 128 * 1000 * 4


@linux
def test_a_checkpoint_is_measured_with_the_speed_of_its_load(run):
    code, out, _ = run("memory", BUNDLED, "--dtype", "float32", "--context", "64", "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0
    assert row["measured"]["load_bytes"] == 2 * row["parameters"]  # stored in float16
    assert row["measured"]["load_seconds"] > 0
    assert row["measured"]["peak"] == pytest.approx(row["predicted"]["peak"], rel=0.1)
    _, text, _ = run("memory", BUNDLED, "--dtype", "float32", "--context", "64")
    for shown in ("measured", "KV cache", "workspace", "GB/s", "has room for a batch of"):
        assert shown in text


def test_what_the_measuring_process_says_is_said(tmp_path):
    folder = make(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        footprint(folder, choose_device("cpu"), predict(CONFIG, "float32", "numpy"))


# --- what is free, and what is refused


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc__meminfo": "MemTotal: 9 kB\nMemAvailable:    3000 kB\n"}, 3000 * 1024),
        (
            {
                "proc__meminfo": "MemAvailable: 3000 kB\n",
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__memory.max": "900000\n",
                "sys__fs__cgroup__a__memory.current": "500000\n",
                "sys__fs__cgroup__a__memory.stat": "anon 1\ninactive_file 100000\n",
                "sys__fs__cgroup__a__b__memory.max": "max\n",
                "sys__fs__cgroup__a__b__memory.current": "1\n",
            },
            500_000,
        ),
        (
            {
                "proc__meminfo": "MemAvailable: 3000 kB\n",
                "proc__self__cgroup": "4:cpu:/x\n3:memory,hugetlb:/a\n",
                "sys__fs__cgroup__memory__a__memory.limit_in_bytes": "700000\n",
                "sys__fs__cgroup__memory__a__memory.usage_in_bytes": "800000\n",
            },
            0,
        ),
    ],
)
def test_the_least_of_the_machine_and_its_limits_is_free(tmp_path, monkeypatch, files, free):
    write(tmp_path, **files)
    monkeypatch.setattr(room, "_ROOT", tmp_path)
    assert room.available(choose_device("cpu")) == free


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""
    return lambda nbytes: monkeypatch.setattr(room, "available", lambda device: nbytes)


def test_weights_that_will_not_fit_are_refused_before_they_are_allocated(tmp_path, free, monkeypatch):
    needed = weight_bytes(CONFIG, "float32") + LOADING
    folder = make(tmp_path / "tiny")
    free(needed)
    model.load(folder, device="cpu")
    free(needed - 1)
    monkeypatch.setattr(np, "empty", None)
    for what, says in (
        (lambda: model.load(folder, device="cpu"), str(folder)),
        (lambda: model.from_config("gpt2", device="cpu"), "gpt2"),
    ):
        with pytest.raises(
            OutOfMemoryError, match=r"as float32 will not fit: it takes .* weights.* free on cpu"
        ) as caught:
            what()
        assert says in str(caught.value)
        assert "float16 takes half" in str(caught.value)


def test_a_cache_that_will_not_fit_is_refused_with_the_numbers(free, run):
    lm = model.from_config(SMALL, device="cpu")
    needs = predict(SMALL, "float32", "numpy", batch=4, context=25).beside_weights
    prompts = [[1, 2, 3, 4, 5]] * 4
    free(needs)
    assert len(lm.generate(prompts, max_new_tokens=20, batch_size=4)) == 4
    free(needs - 1)
    with pytest.raises(OutOfMemoryError, match=r"generating 4 rows of up to 25 tokens .*KV cache.*reduce batch_size"):
        lm.generate(prompts, max_new_tokens=20, batch_size=4)
    assert len(lm.generate(prompts, max_new_tokens=20, batch_size=3)) == 4
    free(1000)
    with pytest.raises(OutOfMemoryError, match="logits of 2 x 3 tokens will not fit"):
        lm.logits([[1, 2, 3], [4, 5, 6]])
    code, out, err = run("generate", "And", "--model", "tiny-gpt2")
    assert (code, out) == (2, "")
    assert err.startswith("error: tiny-gpt2 as float32 will not fit")


class _TorchsError(RuntimeError):
    pass


_TorchsError.__name__ = "OutOfMemoryError"


OUT = "CUDA out of memory. Tried to allocate 20.00 MiB"
# As torch's accelerators, Triton's driver and torch's allocator on the CPU say it.
SAID = [(RuntimeError, "CUDA error: out of memory"), (RuntimeError, "Triton Error [CUDA]: out of memory")]
SAID += [(RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error code 12")]


@pytest.mark.parametrize(("kind", "text"), [(MemoryError, OUT), (_TorchsError, OUT), *SAID])
def test_memory_that_runs_out_all_the_same_is_explained(monkeypatch, free, kind, text):
    lm = model.from_config(SMALL, device="cpu")
    free(10**9)

    def fails(*arguments, **options):
        raise kind(text)

    monkeypatch.setattr(Decoder, "start", fails)
    with pytest.raises(
        OutOfMemoryError, match=r"ran out of memory: .* were predicted, and 1\.00 GB are free.*reduce"
    ) as caught:
        lm.generate([1, 2, 3])
    assert isinstance(caught.value.__cause__, kind)


def test_another_error_is_not_explained_away(monkeypatch):
    lm = model.from_config(SMALL, device="cpu")
    monkeypatch.setattr(Decoder, "start", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.generate([1, 2, 3])


# --- the command


def test_without_a_model_the_table_of_presets_needs_no_checkpoint_and_no_gpu(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = run("memory", "--gpu", "80GB", "--batch", "1,8", "--json")
    document = json.loads(out)
    assert (code, document["place"], document["limit"]) == (0, "cuda", 80 * 10**9)
    assert [row["model"] for row in document["rows"]] == [name for name in PRESETS for _ in range(4)]
    for row in document["rows"]:
        ledger = row["predicted"]
        assert ledger["peak"] == predict(PRESETS[row["model"]], ledger["dtype"], "cuda", batch=ledger["batch"]).peak
        assert row["measured"] is None
        assert row["fits"]["batch"] > 8
    _, text, _ = run("memory")
    for shown in (*PRESETS, "497.9 MB", "249.0 MB", "709.7 MB", "1.42 GB", "3.10 GB", "1.55 GB", "6.23 GB", "3.12 GB"):
        assert shown in text


def test_what_fits_a_named_gpu(run):
    code, text, _ = run("memory", "gpt2-xl", "--gpu", "h100", "--dtype", "float16")
    batch, _ = largest(predict(PRESETS["gpt2-xl"], "float16", "cuda"), PRESETS["gpt2-xl"], 79 * 10**9)
    assert code == 0
    assert f"room for a batch of {batch} at 1024 tokens" in text
    assert "1.00 GB are set aside for CUDA itself: an allowance, not measured" in text
    _, text, _ = run("memory", "gpt2-xl", "--gpu", "4.5 gb", "--dtype", "float32")
    assert "has no room for one row of 1024 tokens" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "H9"), "--gpu: the GPU must be one of"),
        (("--gpu", "5MB"), "5.0 MB are no more than the 1.00 GB set aside"),
        (("--gpu", "1GB"), "1.00 GB are no more than the 1.00 GB set aside"),
        (("--gpu", "80GB", "--measure"), "neither --measure nor --device"),
        (("--gpu", "80GB", "--device", "cpu"), "neither --measure nor --device"),
        (("--batch", "1,x"), "--batch must be whole numbers"),
        (("--batch", "0"), "--batch must be whole numbers"),
        (("--batch", "9" * 5000), "--batch must be whole numbers"),
        (("--gpu", "9" * 400), "--gpu: no GPU has as much as inf bytes"),
        (("--gpu", "9" * 300 + "TB"), "--gpu: no GPU has as much as inf bytes"),
        (("--context", "1025"), "--context must be 1 to 1024, the positions of gpt2, got 1025"),
        (("--dtype", "int8"), "--dtype must be float32, float16, bfloat16, got 'int8'"),
        (("--device", "cpu", "--dtype", "bfloat16"), "bfloat16 needs a torch device"),
        (("--device", "tpu"), "device must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(refused, arguments, says):
    (line,) = refused("memory", "gpt2", *arguments)
    assert says in line


@pytest.mark.parametrize(("options", "error"), [({"batch": 0}, ModelError), ({"context": 17}, ContextError)])
def test_python_refuses_what_cannot_be(options, error):
    with pytest.raises(error, match=next(iter(options))):
        model.from_config(CONFIG, device="cpu").memory(**options)


@linux
def test_a_model_in_memory_is_measured_by_one_of_its_shape():
    found = model.from_config(SMALL, device="cpu").memory(batch=2, context=64, measure=True)
    assert found.measured.peak == pytest.approx(found.predicted.peak, rel=0.1)
    assert found.measured.load_seconds is None
    assert found.available > found.predicted.peak
