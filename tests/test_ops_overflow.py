"""What overflows is infinite or NaN, as torch has it, and NumPy says nothing on the console about it."""

import functools
import warnings

import numpy as np
import pytest
import torch

import gpukernels as g
import model
from gpukernels.verify.compare import host
from model import ModelError

INF = float("inf")
WIDE = [[INF, 1.0, 2.0, -3.0], [6e4, -6e4, 6e4, 6e4], [-INF, INF, 0.0, 1.0]]
LARGE = [[6e4, 5e4, -6e4, 6e4]] * 3

CALLS = {
    "layer_norm": lambda a: g.layer_norm(a(WIDE), a(LARGE[0]), residual=a(LARGE)),
    "rms_norm": lambda a: g.rms_norm(a(WIDE), a(LARGE[0]), residual=a(LARGE)),
    "linear": lambda a: g.linear(a(WIDE), a(LARGE), residual=a(WIDE)[:, :3]),
    "matmul": lambda a: g.matmul(a(WIDE), a(LARGE).T),
    "norm_linear": lambda a: g.norm_linear(a(WIDE), a(LARGE[0]), None, a(LARGE), activation="silu"),
    "gelu": lambda a: g.gelu(a(WIDE)),
    "swiglu": lambda a: g.swiglu(a(WIDE), a(LARGE)),
    "rope": lambda a: g.rope(a(WIDE).reshape(1, 3, 1, 4), a([[3, 4, 5]], "int64")),
    "embedding": lambda a: g.embedding(
        a([[0, 1]], "int64"), a(LARGE), positions=a([[0, 1]], "int64"), position_weight=a(LARGE)
    ),
    "attention": lambda a: g.attention(*[a(WIDE).reshape(1, 3, 1, 4)] * 3, scale=1e38),
    "decode_attention": lambda a: g.decode_attention(
        a(WIDE)[:1].reshape(1, 1, 4), *[a(WIDE).reshape(1, 3, 1, 4)] * 2, a([3], "int32")
    ),
    "cross_entropy": lambda a: g.cross_entropy(a(WIDE), a([0, 1, 2], "int64"), z_loss=1e38, reduction="none"),
    "linear_cross_entropy": lambda a: g.linear_cross_entropy(
        a(WIDE), a(LARGE), a([0, 1, 2], "int64"), reduction="none"
    ),
    "sample": lambda a: g.sample(
        a(WIDE, "float32"), **{name: a([1e-38] * 3, "float32") for name in ("temperature", "top_p", "uniforms")}
    ),
}


def made(library: str, dtype: str, values: list, other: str | None = None):
    array = np.array(values, other or dtype)
    return array if library == "numpy" else torch.from_numpy(array)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("op", CALLS)
def test_numpy_gives_what_torch_gives_and_says_nothing(op, dtype):
    with warnings.catch_warnings(), np.errstate(all="raise"):  # whatever the user has asked NumPy for
        warnings.simplefilter("error")
        found = CALLS[op](functools.partial(made, "numpy", dtype))
    wanted = CALLS[op](functools.partial(made, "torch", dtype))
    for ours, theirs in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, wanted)), strict=True):
        ours, theirs = host(ours), host(theirs)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs))
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))


def test_a_model_that_overflows_says_so_in_its_own_words_alone():
    """Weights beyond float16's range are infinite; loading has a notice for it."""
    config = model.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    lm = model.from_config(config, device="cpu", dtype="float16")
    for name in ("blocks.0.up.weight", "blocks.1.qkv.weight"):
        lm.parameters[name] = np.full_like(lm.parameters[name], np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isfinite(lm.logits([1, 2, 3])).any()
        with pytest.raises(ModelError, match="logits are not finite"):
            lm.generate([1, 2, 3], max_new_tokens=2, temperature=1.0, repetition_penalty=1.1)
