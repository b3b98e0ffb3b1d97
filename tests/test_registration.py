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


def pointwise_calls(kind):
    x, up, dy = leaf(kind, 3, 20), leaf(kind, 3, 20), kind.draw(3, 20)
    packed = leaf(kind, 3, 40)
    for approximate in ("tanh", "none"):
        yield "gelu", (x, approximate)
        yield "gelu_backward", (dy, x.detach(), approximate)
    yield "swiglu", (x, up)
    yield "swiglu", packed.chunk(2, 1)
    yield "swiglu_backward", (dy, x.detach(), up.detach(), [True, True])
    yield "swiglu_backward", (dy, x.detach(), up.detach(), [False, True])
    q, positions, frequencies = leaf(kind, 2, 3, 2, 8), kind.ints([[0, 1, 2], [7, 8, 9]], "int64"), SINGLE.draw(3)
    yield "rope", (q, positions, None, 10000.0, False, False)
    yield "rope", (q, positions, frequencies, 10000.0, True, True)


def embedding_calls(kind):
    ids, weight, other = kind.ints([[1, 0, 1]], "int64"), leaf(kind, 3, 20), leaf(kind, 4, 20)
    yield "embedding", (ids, weight, None, None, torch.float32)
    yield "embedding", (ids, weight, ids, other, weight.dtype)
    yield "embedding_backward", (kind.draw(1, 3, 20), ids, 3, weight.dtype)


def calls(kind) -> list[tuple[str, tuple]]:
    """Calls of every op: its name and its arguments."""
    return [*norm_calls(kind), *pointwise_calls(kind), *embedding_calls(kind)]


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


def gated(packed):
    return library.gelu(library.swiglu(*packed.chunk(2, -1)))


def turned(qkv):
    q, k, _ = qkv.unbind(2)
    positions = torch.arange(qkv.shape[1], device=qkv.device).expand(qkv.shape[:2])
    return library.rope(library.rope(q, positions), positions, interleaved=True) * library.rope(k, positions)


def embedded(weight, position_weight):
    ids = torch.arange(12, device=weight.device).view(3, 4) % 5
    return library.embedding(ids, weight, positions=ids // 2, position_weight=position_weight)


# By name: a function of leaves, and their shapes.
FUNCTIONS = {
    "norms": (norms, [(4, 6, 20), (20,), (20,)]),
    "gated": (gated, [(4, 6, 40)]),
    "embedded": (embedded, [(5, 20), (3, 20)]),
    "turned": (turned, [(2, 5, 3, 2, 8)]),
}


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
