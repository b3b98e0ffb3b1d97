"""Every op as torch sees it: schema, fake tensors, autograd, `torch.compile`.

Runs twice: with the CPU implementations in plain torch, and once more with the interpreted kernels. On a GPU it is one
of the GPU's tests.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from kernel_cases import DEVICE, HALF, SINGLE

from gpukernels import library
from gpukernels.library.few_rows import few_rows
from gpukernels.library.registry import LAUNCHERS
from gpukernels.verify.layouts import LAYOUTS

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

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
        yield f"{name}_backward", (dy, dy, s, weight, mean, rstd, [True] * 3)
        yield f"{name}_backward", (dy, None, s, weight, mean, rstd, [False, True, False])


def attention_calls(kind):
    q, k, v = leaf(kind, 2, 5, 4, 16), leaf(kind, 2, 7, 2, 16), leaf(kind, 2, 7, 2, 16)
    lengths, documents = kind.ints([7, 3]), kind.ints([[0, 0, 1, 1, 1, 1, 2], [4] * 7])
    yield "document_bounds", (documents,)
    bounds = torch.ops.gpukernels.document_bounds(documents)
    for options in ((None, None, 0.25, True, 0), (lengths, bounds, 0.25, True, 3), (lengths, None, 0.25, False, 0)):
        yield "attention", (q, k, v, *options)
        detached = [x.detach() for x in (q, k, v)]
        out, lse = torch.ops.gpukernels.attention(*detached, *options)
        for dlse, needs in ((None, [True] * 3), (lse.nan_to_num(neginf=0.0), [False, True, False])):
            yield "attention_backward", (out.clone(), dlse, *detached, out, lse, *options, needs)
    packed = (leaf(kind, 2, 7, 3, 2, 16), bounds, 0.25, True, 3)
    yield "packed_attention", packed
    out, lse = (x.detach() for x in torch.ops.gpukernels.packed_attention(*packed))
    yield "packed_attention_backward", (out.clone(), packed[0].detach(), out, lse, *packed[1:])


def product_calls(kind):
    x, weight, bias, residual = leaf(kind, 3, 4, 20), leaf(kind, 8, 20), leaf(kind, 8), leaf(kind, 3, 4, 8)
    yield "linear", (x, weight, bias, "gelu", residual, True)
    yield "linear", (x, weight, None, None, None, False)
    dy, x, weight, bias = (each.detach() for each in (residual, x, weight, bias))
    yield "linear_backward", (dy, 2 * dy, x, weight, bias, "gelu", [True] * 3)
    yield "linear_backward", (dy, dy.new_empty(0), x, weight, None, None, [True, False, False])
    yield "matmul", (leaf(kind, 3, 4, 20), leaf(kind, 3, 20, 8), False)
    yield "matmul", (leaf(kind, 3, 4, 20), leaf(kind, 20, 8), False)
    yield "matmul", (leaf(kind, 4, 20), leaf(kind, 20, 8), True)


def few_rows_calls(kind):
    x, weight, bias, residual, norm = (kind.draw(*shape) for shape in [(3, 20), (9, 20), (9,), (3, 9), (20,)])
    yield "few_rows", (x, weight, None, None, None, 0.0, False, None, None)
    yield "few_rows", (x, weight, bias, norm, norm, 1e-5, True, "gelu_new", residual)
    yield "few_rows", (x, weight, bias, norm, None, 1e-6, False, "silu", None)


def loss_calls(kind):
    targets = torch.tensor([[3, -100], [69, 7]], device=DEVICE)
    logits, weights, scale = leaf(kind, 2, 2, 70), SINGLE.draw(2, 2).abs(), SINGLE.draw(1)
    for given, reduction in ((weights, "mean"), (None, "none")):
        options = (-100, 0.1, 0.01, reduction)
        yield "cross_entropy", (logits, targets, given, *options)
        yield "cross_entropy_with_gradient", (logits.detach(), targets, given, *options, scale)
        op = torch.ops.gpukernels.cross_entropy.default
        loss, lse, divisor = (each.detach() for each in op(logits, targets, given, *options))
        yield "cross_entropy_backward", (loss, logits.detach(), targets, given, lse, divisor, *options[:3])


def linear_loss_calls(kind):
    targets = torch.tensor([3, -100, 69], device=DEVICE)
    hidden, weight, weights = leaf(kind, 3, 20), leaf(kind, 70, 20), SINGLE.draw(3).abs()
    for given, reduction in ((None, "mean"), (weights, "none")):
        options = (-100, 0.1, 0.01, reduction, 2)
        yield "linear_cross_entropy", (hidden, weight, targets, given, *options, True, True)
        op = torch.ops.gpukernels.linear_cross_entropy.default
        arrays = (hidden.detach(), weight.detach(), targets, given)
        loss, *saved = (each.detach() for each in op(*arrays, *options, True, True))
        yield "linear_cross_entropy_backward", (loss, *arrays, *saved, *options, False, True)


def adamw_calls(kind):
    p, g = kind.draw(20), kind.draw(20, seed=1)
    m, v, master = SINGLE.draw(20, seed=2), SINGLE.draw(20, seed=3).abs(), None if kind is SINGLE else SINGLE.draw(20)
    step, rate = SINGLE.ints([3]), SINGLE.draw(1).abs()
    yield "adamw", (p, g, m, v, master, step, rate, None, 0.9, 0.999, 1e-8, 0.1, 7)
    yield "adamw", (p, g, m, v, master, step, rate, rate, 0.9, 0.999, 1e-8, 0.0, 20)


def decode_attention_calls(kind):
    q, cache, lengths = kind.draw(2, 2, 20), kind.draw(2, 2, 9, 20).transpose(1, 2), kind.ints([9, 3])
    yield "decode_attention", (q, cache, cache + 1, lengths, None, 0.2)
    yield "decode_attention", (q, cache, cache + 1, lengths.long(), 4, 0.2)


def cached_attention_calls(kind):
    q, cache, lengths = kind.draw(2, 3, 2, 20), kind.draw(2, 2, 9, 20).transpose(1, 2), kind.ints([9, 3])
    more = (lengths, None, 0.2)
    yield "cached_attention", (q, q + 1, q - 1, cache.clone(), cache + 1, *more, None)
    arrivals = torch.zeros((2, 2), dtype=torch.int32, device=DEVICE)
    q = q[:, :1]
    yield "cached_attention", (q, q + 1, q - 1, cache.clone(), cache + 1, *more, arrivals)


def sample_calls(kind):
    logits, floats = kind.draw(3, 20), [SINGLE.array([0.0, 0.5, 0.9]) for _ in range(4)]
    ints, seen = kind.ints([2, 0, 1]), kind.draw(3, 20) > 0
    yield "sample", (logits, *[None] * 10)
    yield "sample", (logits, floats[0], ints, *floats[1:3], floats[3] + 0.5, seen, floats[0], None, None, None)
    yield "sample", (logits, floats[0], None, None, None, None, None, None, ints.long(), ints, ints)
    weight, x = kind.draw(20, 12), kind.draw(3, 1, 12)
    yield "sample_embed", (logits, *[None] * 10, ints.clone(), weight, None, x)
    options = (floats[0], ints, *floats[1:3], floats[3] + 0.5, seen, None, ints.long(), ints, ints.clone())
    yield "sample_embed", (logits, *options, ints.clone(), weight, kind.draw(3, 12), x)


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


FAMILIES = (
    norm_calls, attention_calls, product_calls, few_rows_calls, loss_calls, linear_loss_calls, adamw_calls,
    decode_attention_calls, cached_attention_calls, sample_calls, pointwise_calls, embedding_calls,
)  # fmt: skip

# Its family and its place there tell a call from the others; inputs, which other ops have to make, are made when its
# test runs.
CALLS = [(family, number, name) for family in FAMILIES for number, (name, _) in enumerate(family(SINGLE))]


def test_every_op_is_here():
    assert {name for _, _, name in CALLS} == set(LAUNCHERS)


@pytest.mark.parametrize("kind", [SINGLE, HALF], ids=lambda kind: kind.dtype)
@pytest.mark.parametrize(("family", "number", "name"), CALLS, ids=lambda each: getattr(each, "__name__", str(each)))
def test_opcheck(kind, family, number, name):
    _, arguments = next(itertools.islice(family(kind), number, None))
    torch.library.opcheck(getattr(torch.ops.gpukernels, name).default, arguments)


def norms(x, weight, bias):
    y, s = library.layer_norm(x, weight, bias, residual=x)
    return library.rms_norm(y + s, weight)


def attend(q, k, v):
    out, lse = library.attention(q, k, v, window=4, return_lse=True)
    return out * lse.mT[..., None]


def block(x, norm_weight, up, down, bias=None, norm="layer"):
    options = {"norm": norm, "activation": "gelu_new", "with_x": True}
    y, x = library.norm_linear(x, norm_weight, None, up, bias, **options)
    return library.matmul(library.linear(y, down, residual=x), down)


def losses(logits):
    targets = torch.arange(12, device=logits.device).view(3, 4)
    each = library.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    mean = library.cross_entropy(logits, targets, z_loss=0.1)
    loss, dlogits = library.cross_entropy_with_gradient(logits, targets)
    return each + mean + loss + dlogits[..., 0]


def linear_losses(hidden, weight):
    targets = torch.arange(12, device=hidden.device).view(3, 4)
    each = library.linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, reduction="none")
    return each + library.linear_cross_entropy(hidden, weight, targets, chunk=5)


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
    "attention": (attend, [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)]),
    "packed attention": (lambda qkv: library.packed_attention(qkv, window=4), [(2, 7, 3, 2, 16)]),
    "products": (block, [(4, 6, 20), (20,), (40, 20), (20, 40), (40,)]),
    "products behind an RMS norm": (partial(block, norm="rms"), [(4, 6, 20), (20,), (40, 20), (20, 40)]),
    "losses": (losses, [(3, 4, 70)]),
    "linear losses": (linear_losses, [(3, 4, 20), (70, 20)]),
    "gated": (gated, [(4, 6, 40)]),
    "embedded": (embedded, [(5, 20), (3, 20)]),
    "turned": (turned, [(2, 5, 3, 2, 8)]),
}


def decode(x, weight, bias, norm_weight):
    h = few_rows(x, weight, bias, norm=(norm_weight, bias, 1e-5, True), activation="gelu", residual=x)
    return few_rows(h + 1, weight)


# The same for inference, where there is no gradient.
INFERENCE = {"few rows": (decode, [(3, 20), (20, 20), (20,), (20,)])}


@pytest.mark.parametrize("name", INFERENCE)
def test_compiled_whole_for_inference(name):
    function, shapes = INFERENCE[name]
    arrays = [SINGLE.draw(*shape) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(*arrays), function(*arrays), rtol=RTOL, atol=ATOL)


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


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "turned"])  # a turn has every derivative
def test_a_second_derivative_is_refused_and_not_wrong(name):
    """torch takes a backward op without a gradient for a constant, and only warns of it."""
    function, shapes = FUNCTIONS[name]
    leaves = [leaf(SINGLE, *shape) for shape in shapes]
    y = function(*leaves)
    dy = SINGLE.draw(*y.shape, seed=1)
    want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    found = torch.autograd.grad(y, leaves, dy, create_graph=True)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    if any(x.requires_grad for x in found):  # an embedding's gradient is none of its table's
        with pytest.raises(RuntimeError, match=r"gpukernels::\w+ has no second derivative; plain torch has one"):
            torch.autograd.grad(sum(x.square().sum() for x in found), leaves, allow_unused=True)
    else:
        assert name == "embedded"


def test_a_graph_of_a_checkpointed_op_may_be_asked_for():
    x = leaf(SINGLE, 3, 20)
    y = torch.utils.checkpoint.checkpoint(library.gelu, x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(library.gelu(x).sum(), x)
    assert torch.equal(found, want)


def test_the_second_derivative_of_a_product_is_torchs():
    leaves = [leaf(SINGLE, 3, 4), leaf(SINGLE, 4, 5)]
    seconds = []
    for product in (library.matmul, torch.matmul):
        firsts = torch.autograd.grad(product(*leaves).square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in firsts), leaves))
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-3)


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
