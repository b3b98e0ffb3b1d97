"""`sample` and `sample_embed` as torch ops, without a gradient.

`uniform` is plain torch: on the GPU `sample` draws by itself.
"""

import torch

from gpukernels import torch_ops
from gpukernels.kernels.sampling import sample as launch
from gpukernels.library.registry import define, empty
from gpukernels.torch_ops import uniform as uniform

_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seen",
    "uniforms",
    "seed",
    "stream",
    "step",
)


def _plain(logits, *options):
    return torch_ops.sample(logits, **dict(zip(_OPTIONS, options, strict=True)))


def _fake(logits, *options):
    return empty(logits, logits.shape[0], dtype=torch.int64)


_sample = define(
    f"sample(Tensor logits, {', '.join(f'Tensor? {name}' for name in _OPTIONS)}) -> Tensor",
    launch=launch,
    plain=_plain,
    fake=_fake,
)


def sample(
    logits,
    *,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    seen=None,
    uniforms=None,
    seed=None,
    stream=None,
    step=None,
):
    return _sample(logits, temperature, top_k, top_p, min_p, repetition_penalty, seen, uniforms, seed, stream, step)


def _embed_plain(logits, *rest):
    options = dict(zip(_OPTIONS, rest, strict=False))
    names = ("lengths", "weight", "position_weight", "x")
    return torch_ops.sample_embed(logits, **options, **dict(zip(names, rest[len(options) :], strict=True)))


_WRITTEN = {"seen": "(a!)", "step": "(b!)"}
_SCHEMA = ", ".join(f"Tensor{_WRITTEN.get(name, '')}? {name}" for name in _OPTIONS)
_sample_embed = define(
    f"sample_embed(Tensor logits, {_SCHEMA}, "
    "Tensor(c!) lengths, Tensor weight, Tensor? position_weight, Tensor(d!) x) -> Tensor",
    launch=launch,
    plain=_embed_plain,
    fake=_fake,
)


def sample_embed(logits, *, lengths, weight, position_weight=None, x, **options):
    drawing = (options.get(name) for name in _OPTIONS)
    return _sample_embed(logits, *drawing, lengths, weight, position_weight, x)
