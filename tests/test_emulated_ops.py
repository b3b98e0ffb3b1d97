"""Ops as they are compiled for a GPU, emulated: what `verify` runs, tiles of tensor cores and TMA, and models."""

from pathlib import Path

import pytest
import torch

import gpukernels
import model
from gpukernels.emulator import emulated
from gpukernels.verify import OPS
from gpukernels.verify.compare import backward, forward
from gpukernels.verify.run import verify

CPU = torch.device("cpu")

# One dtype each, and not those whose kernels the tiles below have: all are in `gpukernels verify --device sm_90`.
_DTYPES = {op: ("float16", "bfloat16", "float32")[i % 3] for i, op in enumerate(OPS)}
_OPS = [op for op in OPS if op not in ("linear", "attention", "packed_attention", "rms_norm", "linear_cross_entropy")]


@pytest.mark.parametrize("op", _OPS)
def test_every_bound_holds(op):
    with emulated(90) as driver:
        for verdict in verify(op, _DTYPES[op], CPU, quick=True):
            assert verdict.holds, verdict
    assert driver.ran


def draw(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Op, arrays, options, and the kernels of its forward pass.
TILES = {
    "a product by columns": (
        "matmul", {"a": draw(320, 200).T, "b": draw(264, 320).T}, {}, "_product_descriptor_kernel",
    ),
    "a product with all that is fused": (
        "linear",
        {"x": draw(300, 256), "weight": draw(520, 256), "bias": draw(520), "residual": draw(300, 520)},
        {"activation": "gelu_new"},
        "_product_descriptor_kernel",
    ),
    "attention, head 64": (
        "attention", {name: draw(1, 200, 2, 64, seed=i) for i, name in enumerate("qkv")}, {},
        "_attention_forward_kernel",
    ),
    "attention, head 128, a window": (
        "attention",
        {"q": draw(1, 150, 2, 128), "k": draw(1, 170, 1, 128, seed=1), "v": draw(1, 170, 1, 128, seed=2)},
        {"window": 70},
        "_attention_forward_kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", TILES)
def test_whole_tiles_and_their_gradients(name, capability):
    op, arrays, options, kernel = TILES[name]
    with emulated(capability) as driver:
        with torch.no_grad():
            results = list(forward(op, arrays, **options))
        wanted = kernel.replace("_descriptor", "") if capability == 80 else kernel
        assert set(driver.ran) == {wanted}
        results += backward(op, arrays, **options)
    for each in results:
        assert each.errors().max() <= 1, each.what


def test_a_model_gives_numpys_logits():
    lm = model.load("tiny-gpt2", device="cpu")
    ids = lm.tokenizer.encode("And God said")
    wanted, plain = lm.logits(ids), model.load("tiny-gpt2", device=CPU)
    with emulated(90) as driver:
        found = plain.logits(ids)
    assert {"_few_rows_kernel", "_attention_forward_kernel"} <= set(driver.ran)
    assert abs(found - wanted).max() <= 1e-4


def test_programs_of_the_persistent_step_wait_for_one_another(monkeypatch):
    """Three programs on as many multiprocessors, which run in turns until all have come to each barrier."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "kernels")
    import test_persistent
    from decoding import decoder_of, lively

    with emulated(90, multiprocessors=3) as driver:
        lm = lively(CPU, "float16", n_embd=32, n_head=2)
        eager, ours = decoder_of(lm, rows=3), test_persistent.persistent(lm, 3)
        names = test_persistent.in_use(eager, ours)
        logits = eager._logits(3, eager.capacity)
        wanted = eager._choose(logits, 0, 3, names)
        assert ours._step(3, ours.capacity, names).tolist() == wanted.tolist()
        assert driver.ran["_persistent_step_kernel"] == 1
        atol = 2.0**-9 * float(logits.abs().max())
        torch.testing.assert_close(ours.step_logits(3)[[0, 2]], logits[[0, 2]], rtol=0, atol=atol)
        test_persistent.check_state(ours, eager, atol=2.0**-9 * float(eager.cache.keys.abs().max()))


def test_a_broken_kernel_is_found(monkeypatch):
    """It reads behind its array, where a GPU may find anything."""
    from gpukernels.kernels import pointwise

    x = draw(2, 40)
    launch = pointwise._gelu_forward_kernel
    monkeypatch.setattr(pointwise, "_gelu_forward_kernel", _Longer(launch))
    with emulated(80), pytest.raises(RuntimeError, match=r"_gelu_forward_kernel, pointwise.py:\d+: a load of"):
        gpukernels.gelu(x)


class _Longer:
    """A kernel that is told of more elements than there are."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            sizes = [2 * arg + 4096 if isinstance(arg, int) and arg >= 40 else arg for arg in args]
            return self._kernel[grid](*sizes, **options)

        return launch
