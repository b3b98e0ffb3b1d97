"""Calls that together launch every kernel, by name, and with other sizes than any block has."""

import torch
from kernel_cases import DEVICE, HALF, SINGLE

import gpukernels
from gpukernels.kernels.matmul import long_product


def _leaves(*arrays):
    return [array.requires_grad_() for array in arrays]


def _back(results, leaves):
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.grad(results, leaves, [torch.ones_like(each) for each in results])


def norms(width=200, rows=37):
    x, residual, weight, bias = _leaves(*(HALF.draw(*s) for s in ((rows, width), (rows, width), (width,), (width,))))
    _back(gpukernels.layer_norm(x, weight, bias, residual=residual), [x, residual, weight, bias])
    _back(gpukernels.rms_norm(x, weight), [x, weight])


def attention(**options):
    q, k, v = _leaves(HALF.draw(2, 70, 4, 24), HALF.draw(2, 90, 2, 24), HALF.draw(2, 90, 2, 24))
    _back(gpukernels.attention(q, k, v, **options), [q, k, v])


def products(rows=130):
    x, weight, bias, residual = _leaves(HALF.draw(rows, 72), HALF.draw(40, 72), HALF.draw(40), HALF.draw(rows, 40))
    _back(gpukernels.linear(x, weight, bias, activation="gelu", residual=residual), [x, weight, bias, residual])
    a, b = HALF.draw(3, 50, 24), HALF.draw(3, 24, 20)
    gpukernels.matmul(a, b)


def long_sums():
    out = SINGLE.draw(20, 24)
    a, b = HALF.draw(2000, 20), HALF.draw(2000, 24)
    long_product(a.T, b, out=out, accumulate=True)
    long_product(a.T, b)


def few(K=200):
    x, weight, bias, residual = HALF.draw(5, K), HALF.draw(43, K), HALF.draw(43), HALF.draw(5, 43)
    norm, norm_bias = HALF.draw(K), HALF.draw(K)
    with torch.no_grad():
        gpukernels.linear(x, weight, bias, residual=residual)
        gpukernels.norm_linear(x, norm, norm_bias, weight, bias)
        gpukernels.norm_linear(x, norm, None, weight, norm="rms")


def losses():
    logits, targets = HALF.draw(9, 300).requires_grad_(), SINGLE.ints(range(9), "int64")
    _back(gpukernels.cross_entropy(logits, targets, label_smoothing=0.1), [logits])
    weights = SINGLE.draw(9).abs()
    gpukernels.cross_entropy_with_gradient(logits.detach(), targets, weights=weights)
    hidden, weight = _leaves(HALF.draw(9, 40), HALF.draw(300, 40))
    _back(gpukernels.linear_cross_entropy(hidden, weight, targets), [hidden, weight])


def optimizer():
    first, second, master = SINGLE.draw(3000), SINGLE.draw(3000).abs(), SINGLE.draw(3000)
    options = {"step": SINGLE.ints([1]), "learning_rate": SINGLE.array([1e-3])}
    gpukernels.adamw(HALF.draw(3000), HALF.draw(3000), first, second, master=master, **options)
    gpukernels.adamw(SINGLE.draw(3000), SINGLE.draw(3000), first, second, **options)


def caches(heads=(4, 2), length=140):
    q, cache = HALF.draw(2, heads[0], 24), HALF.draw(2, heads[1], length, 24)
    keys, values, lengths = cache.transpose(1, 2), (cache + 1).transpose(1, 2), SINGLE.ints([length, length])
    gpukernels.decode_attention(q, keys, values, lengths)
    gpukernels.decode_attention(q, keys, values, lengths, window=50)
    k = HALF.draw(2, 1, heads[1], 24)
    gpukernels.cached_attention(q[:, None], k, k + 1, keys, values, lengths)
    k = HALF.draw(2, 30, heads[1], 24)
    gpukernels.cached_attention(HALF.draw(2, 30, heads[0], 24), k, k + 1, keys, values, lengths)


def samples():
    logits, one = HALF.draw(3, 500), SINGLE.ints([1, 1, 1])
    logits[range(3), [7, 80, 9]] = 40  # three tokens, whatever is drawn
    gpukernels.sample(logits)
    table, x = HALF.draw(500, 70), torch.zeros((3, 1, 70), dtype=torch.float16, device=DEVICE)
    lengths = SINGLE.ints([3, 5, 6])
    gpukernels.sample_embed(logits, lengths=lengths, weight=table, position_weight=table[:9], x=x)
    options = {"temperature": SINGLE.array([1, 1, 1]), "seed": one, "stream": one + 1, "step": one + 2}
    options |= {"repetition_penalty": SINGLE.array([1, 1, 1]), "seen": torch.zeros_like(logits, dtype=torch.bool)}
    gpukernels.sample_embed(logits, lengths=lengths, weight=table, x=x, **options)


def pointwise():
    x, up = _leaves(HALF.draw(9, 100), HALF.draw(9, 100))
    _back(gpukernels.gelu(x), [x])
    _back(gpukernels.swiglu(x, up), [x, up])
    turned = HALF.draw(2, 5, 3, 16)
    gpukernels.rope(turned, SINGLE.ints(torch.arange(10).reshape(2, 5), "int64"))
    ids, table, positions = SINGLE.ints([[3, 1, 4]], "int64"), *_leaves(HALF.draw(20, 33), HALF.draw(9, 33))
    _back(gpukernels.embedding(ids, table, positions=ids + 1, position_weight=positions), [table, positions])


CASES = {
    "norms": norms,
    "norms of wide rows": lambda: norms(20000, 2),
    "attention": attention,
    "attention to the end": lambda: attention(causal=False),
    "attention in a window": lambda: attention(window=20),
    "attention of documents": lambda: attention(documents=SINGLE.ints([[0] * 30 + [1] * 60] * 2)),
    "products": products,
    "long sums": long_sums,
    "few rows": few,
    "few rows, a long K": lambda: few(9000),
    "losses": losses,
    "optimizer": optimizer,
    "caches": caches,
    "caches of own heads": lambda: caches((3, 3)),
    "samples": samples,
    "pointwise": pointwise,
}
