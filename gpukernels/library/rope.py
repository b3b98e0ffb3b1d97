"""`rope` as a torch op, which is its own gradient, the other way round."""

import functools

import torch

from gpukernels import torch_ops
from gpukernels.kernels.rope import rotate
from gpukernels.library.registry import define, differentiate, empty
from gpukernels.torch_ops.rope import default_frequencies


@functools.cache  # for good: a captured graph reads them where they are
def _frequencies(theta: float, width: int, device: torch.device) -> torch.Tensor:
    """The default frequencies, copied to a device once: a CUDA graph cannot capture such a copy."""
    return default_frequencies(theta, width).to(device)


def _launch(x, positions, frequencies, theta, interleaved, inverse):
    if frequencies is None:
        frequencies = _frequencies(theta, x.shape[3], x.device)
    return rotate(x, positions, frequencies, interleaved=interleaved, inverse=inverse)


def _plain(x, positions, frequencies, theta, interleaved, inverse):
    if frequencies is None:
        frequencies = _frequencies(theta, x.shape[3], x.device)
    frequencies = -frequencies if inverse else frequencies
    return torch_ops.rope(x, positions, frequencies=frequencies, interleaved=interleaved).contiguous()


_rope = define(
    "rope(Tensor x, Tensor positions, Tensor? frequencies, float theta, bool interleaved, bool inverse) -> Tensor",
    launch=_launch,
    plain=_plain,
    fake=lambda x, *_: empty(x, *x.shape),
)


def _save(ctx, inputs, output):
    _, positions, frequencies, *ctx.options = inputs
    ctx.save_for_backward(positions, frequencies)


def _differentiate(ctx, dy):
    theta, interleaved, inverse = ctx.options
    return _rope(dy, *ctx.saved_tensors, theta, interleaved, not inverse), None, None, None, None, None


differentiate(_rope, _save, _differentiate, twice=True)


def rope(x, positions, *, theta=10000.0, frequencies=None, interleaved=False):
    return _rope(x, positions, frequencies, theta, interleaved, False)
