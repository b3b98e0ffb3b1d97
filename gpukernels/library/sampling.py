"""`sample` as a torch op, without a gradient. `uniform` is plain torch: on the GPU `sample` draws by itself."""

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
