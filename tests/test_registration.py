"""Every op as torch sees it: schema, fake tensors, autograd, `torch.compile`.

Runs twice: with the CPU implementations in plain torch, and once more with the interpreted kernels.
"""

import pytest
import torch
from kernel_cases import DEVICE, HALF, LAYOUTS, SINGLE

from gpukernels import library
from gpukernels.library.registry import LAUNCHERS

RTOL, ATOL = 1e-3, 1e-3  # eager against compiled: the same kernels, in float16 at worst


def leaf(kind, *shape):
    return kind.draw(*shape).requires_grad_()


def norm_calls(kind):
    for name in ("layer_norm", "rms_norm"):
        x, weight, residual = leaf(kind, 3, 20), leaf(kind, 20), leaf(kind, 3, 20)
        bias = leaf(kind, 20) if name == "layer_norm" else None
        yield name, (x, weight, bias, residual, 1e-5)
        yield name, (x, weight, None, None, 1e-5)
        op = getattr(torch.ops.gpukernels, name).default
        _, _, mean, rstd = (each.detach() for each in op(x, weight, bias, None, 1e-5))
        dy, s, weight = residual.detach(), x.detach(), weight.detach()
        yield f"{name}_backward", (dy, dy, s, weight, mean, rstd, 1e-5, [True] * 3)
        yield f"{name}_backward", (dy, None, s, weight, mean, rstd, 1e-5, [False, True, False])


def decode_attention_calls(kind):
    q, cache, lengths = kind.draw(2, 2, 20), kind.draw(2, 2, 9, 20).transpose(1, 2), kind.ints([9, 3])
    yield "decode_attention", (q, cache, cache + 1, lengths, None, 0.2)
    yield "decode_attention", (q, cache, cache + 1, lengths.long(), 4, 0.2)


def sample_calls(kind):
    logits, floats = kind.draw(3, 20), [SINGLE.array([0.0, 0.5, 0.9]) for _ in range(4)]
    ints, seen = kind.ints([2, 0, 1]), kind.draw(3, 20) > 0
    yield "sample", (logits, *[None] * 10)
    yield "sample", (logits, floats[0], ints, *floats[1:3], floats[3] + 0.5, seen, floats[0], None, None, None)
    yield "sample", (logits, floats[0], None, None, None, None, None, None, ints.long(), ints, ints)


def calls(kind) -> list[tuple[str, tuple]]:
    """Calls of every op: its name and its arguments."""
    return [*norm_calls(kind), *decode_attention_calls(kind), *sample_calls(kind)]


def test_every_op_is_here():
    assert {name for name, _ in calls(SINGLE)} == set(LAUNCHERS)


# The number tells the calls of one op apart; inputs are made when a test runs.
NUMBERED = [(number, name) for number, (name, _) in enumerate(calls(SINGLE))]


@pytest.mark.parametrize("kind", [SINGLE, HALF], ids=lambda kind: kind.dtype)
@pytest.mark.parametrize(("number", "name"), NUMBERED)
def test_opcheck(kind, number, name):
    torch.library.opcheck(getattr(torch.ops.gpukernels, name).default, calls(kind)[number][1])


def norms(x, weight, bias):
    y, s = library.layer_norm(x, weight, bias, residual=x)
    return library.rms_norm(y + s, weight)


# By name: a function of leaves, and their shapes.
FUNCTIONS = {"norms": (norms, [(4, 6, 20), (20,), (20,)])}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_whole_and_differentiated_with_any_gradient(name, layout):
    function, shapes = FUNCTIONS[name]
    leaves = [leaf(SINGLE, *shape) for shape in shapes]
    # Inductor would need a C++ compiler on the CPU; what it adds behind the graph is torch's own.
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    results = []
    for run in (function, compiled):
        y = run(*leaves)
        dy = LAYOUTS[layout](SINGLE.draw(*y.shape, seed=1))
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=RTOL, atol=ATOL)


def test_decode_attention_compiled_whole():
    (q, k, v, lengths, *_), *_ = (arguments for _, arguments in decode_attention_calls(SINGLE))
    compiled = torch.compile(library.decode_attention, fullgraph=True, backend="aot_eager")
    want = library.decode_attention(q, k, v, lengths, window=4)
    torch.testing.assert_close(compiled(q, k, v, lengths, window=4), want, rtol=RTOL, atol=ATOL)


def test_sample_compiled_whole():
    logits, temperature = SINGLE.draw(3, 20), SINGLE.array([0.0, 0.5, 0.9])
    compiled = torch.compile(library.sample, fullgraph=True, backend="aot_eager")
    options = {"temperature": temperature, "top_p": temperature, "uniforms": temperature}
    assert torch.equal(compiled(logits, **options), library.sample(logits, **options))
