"""Any argument of any public op may have any strides: also the small ones, which a kernel reads element by element."""

import pytest
import torch
from kernel_cases import SINGLE

import gpukernels

VOCABULARY = 37


def floats(*shape):
    return SINGLE.draw(*shape)


def positive(*shape):
    return SINGLE.draw(*shape).abs() + 0.1


def below(most, *shape):
    return SINGLE.ints(torch.arange(torch.Size(shape).numel()).reshape(shape) * 7 % most, "int64")


def products(rows):
    return {"x": floats(rows, 24), "weight": floats(12, 24), "bias": floats(12)}


#: By name and case: the tensors, and the other options.
CALLS = {
    "attention": (
        {"q": floats(2, 5, 4, 16), "k": floats(2, 7, 2, 16), "v": floats(2, 7, 2, 16)}
        | {"lengths": SINGLE.ints([6, 7]), "documents": below(99, 2, 7) // 40},
        {},
    ),
    "decode_attention": (
        {"q": floats(2, 4, 16), "k": floats(2, 70, 2, 16), "v": floats(2, 70, 2, 16), "lengths": SINGLE.ints([6, 66])},
        {},
    ),
    "layer_norm": ({"x": floats(4, 24), "weight": floats(24), "bias": floats(24), "residual": floats(4, 24)}, {}),
    "rms_norm": ({"x": floats(4, 24), "weight": floats(24), "residual": floats(4, 24)}, {}),
    "linear, few rows": (products(4) | {"residual": floats(4, 12)}, {"activation": "gelu"}),
    "linear": (products(70) | {"residual": floats(70, 12)}, {"activation": "gelu"}),
    "norm_linear, few rows": (products(4) | {"norm_weight": floats(24), "norm_bias": floats(24)}, {}),
    "norm_linear": (products(70) | {"norm_weight": floats(24), "norm_bias": floats(24)}, {}),
    **{
        f"norm_linear, RMS{few}": ({**products(rows), "norm_weight": floats(24)}, {"norm": "rms", "norm_bias": None})
        for few, rows in ((", few rows", 4), ("", 70))
    },
    "matmul": ({"a": floats(2, 4, 24), "b": floats(2, 24, 12)}, {}),
    "embedding": (
        {"ids": below(5, 2, 3), "weight": floats(5, 8), "positions": below(4, 2, 3), "position_weight": floats(4, 8)},
        {},
    ),
    "gelu": ({"x": floats(4, 24)}, {}),
    "swiglu": ({"gate": floats(4, 24), "up": floats(4, 24)}, {}),
    "rope": ({"x": floats(2, 3, 2, 8), "positions": below(9, 2, 3), "frequencies": positive(4)}, {}),
    **{
        name: ({"logits": floats(6, VOCABULARY), "targets": below(VOCABULARY, 6), "weights": positive(6)}, {})
        for name in ("cross_entropy", "cross_entropy_with_gradient")
    },
    "linear_cross_entropy": (
        {"hidden": floats(6, 16), "weight": floats(VOCABULARY, 16)}
        | {"targets": below(VOCABULARY, 6), "weights": positive(6)},
        {},
    ),
    "sample, from uniforms": (
        {"logits": floats(4, VOCABULARY), "temperature": positive(4), "top_k": below(9, 4) + 1, "top_p": positive(4)}
        | {"min_p": positive(4) / 20, "repetition_penalty": positive(4), "seen": below(2, 4, VOCABULARY).bool()}
        | {"uniforms": positive(4) % 1},
        {},
    ),
    "sample": (
        {"logits": floats(4, VOCABULARY), "temperature": positive(4)}
        | {"seed": below(5, 4), "stream": below(6, 4), "step": below(7, 4)},
        {},
    ),
    "uniform": ({"seed": below(5, 4), "stream": below(6, 4), "step": below(7, 4)}, {}),
}
CASES = [(name, argument) for name, (tensors, _) in CALLS.items() for argument in tensors]
WITHOUT_GRADIENT = {"decode_attention", "sample", "uniform"}


def between_others(x):
    """x, whose elements now lie three apart, with values between them that would show."""
    wide = x.new_full((*x.shape, 3), torch.nan if x.is_floating_point() else 1)
    wide[..., 1] = x
    return wide[..., 1]


def results(name, tensors, options):
    op = name.partition(",")[0]
    differentiated = op not in WITHOUT_GRADIENT
    tensors = {
        key: x.detach().requires_grad_(differentiated and x.is_floating_point() and key != "frequencies")
        for key, x in tensors.items()
    }
    found = getattr(gpukernels, op)(**tensors, **options)
    found = found if isinstance(found, tuple) else (found,)
    ends, leaves = [x for x in found if x.requires_grad], [x for x in tensors.values() if x.requires_grad]
    if ends:
        found += torch.autograd.grad(ends, leaves, [torch.ones_like(x) for x in ends], allow_unused=True)
    return found


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}: {argument}" for name, argument in CASES])
def test_strides_change_nothing(name, argument):
    tensors, options = CALLS[name]
    strided = results(name, tensors | {argument: between_others(tensors[argument])}, options)
    # The order of a sum of at most 70 float32 products may be another.
    torch.testing.assert_close(strided, results(name, tensors, options), rtol=1e-5, atol=1e-5)
