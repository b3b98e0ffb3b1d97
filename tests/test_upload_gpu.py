"""Loading on a GPU: the casts and counts are NumPy's bit for bit, and memory stays within its bounds."""

import warnings

import numpy as np
import pytest
import torch
from damage import make, tensors
from test_cast import samples
from test_upload import DTYPES, SHAPES, reader, wanted

import model
from gpukernels.cast import FORMATS, count_losses, cuda_upload
from gpukernels.cast.host import widened
from gpukernels.cast.upload import BUFFER

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CONFIG = model.GPT2Config(vocab_size=20_000, n_positions=64, n_embd=768, n_layer=4, n_head=12)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_and_shape_arrives_and_is_counted_as_numpys(format, dtype):
    source = samples(format)
    sources = [source[: source.size // 96 * 96].reshape(-1, 96), *(source[: a * b].reshape(a, b) for a, b in SHAPES)]
    sources = [(each, transposed) for each in sources for transposed in (False, True)]
    outs = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        upload = cuda_upload(torch.device("cuda"), len(sources), dtype=dtype)
        for each, transposed in sources:
            shape = each.shape[::-1] if transposed else each.shape
            outs.append(torch.empty(shape, dtype=getattr(torch, dtype), device="cuda"))
            upload.add(reader(each), format, each.shape, outs[-1], transposed=transposed)
        losses = upload.finish()
    for (each, transposed), out, lost in zip(sources, outs, losses, strict=True):
        out = out.cpu().view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else out.cpu().numpy()
        out = widened(out, "BF16") if dtype == "bfloat16" else out
        np.testing.assert_array_equal(out.T if transposed else out, wanted(each, format, dtype))
        assert lost == count_losses(each, format, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_the_one_that_the_host_loads_within_64_mib_of_its_weights(tmp_path, dtype):
    every = tensors(CONFIG)
    every["wte.weight"].flat[[3, -1]] = 1e30, np.inf
    every["h.1.mlp.c_fc.weight"][5, 7] = -70000.0
    folder = make(tmp_path / "large", CONFIG, every)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(action="ignore", category=model.LoadNotice):
        lm = model.load(folder, device="cuda", dtype=dtype)
        peak = torch.cuda.max_memory_allocated() - before
        host = model.load(folder, device=torch.device("cpu"), dtype=dtype)
    assert peak <= lm.parameters.nbytes + (64 << 20)
    assert peak >= lm.parameters.nbytes + BUFFER  # one staging buffer, and nothing of the size of a tensor
    for name, parameter in lm.parameters.items():
        assert torch.equal(parameter.cpu().nan_to_num(), host.parameters[name].nan_to_num()), name
    assert lm.notices == host.notices
    assert "pinned" in lm.filled.way
    if dtype != "float32":
        assert lm.filled.losses == host.filled.losses
