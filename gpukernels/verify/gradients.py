"""How large the terms of each gradient are, for `bound`: of the float64 arguments and upstream gradients of an op.

`GRADIENTS` has a function for each op: (arrays and options by name, `douts` a list) -> {name: (magnitude, length
of the sum)}.
"""

import numpy as np

from gpukernels.verify.truth import STEEPEST, normed, true_rope


def layer_norm(x, weight, douts, bias=None, residual=None, *, eps=1e-5):
    return _norm(x, weight, douts, residual, eps, center=True)


def rms_norm(x, weight, douts, residual=None, *, eps=1e-6):
    return _norm(x, weight, douts, residual, eps, center=False)


def _norm(x, weight, douts, residual, eps, *, center):
    s = x if residual is None else x + residual
    size = abs(x) if residual is None else abs(x) + abs(residual)
    width = x.shape[-1]

    def mean(values):
        return values.sum(-1, keepdims=True) / width

    deviation = s - mean(s) if center else s
    rstd = 1 / np.sqrt(mean(deviation**2) + eps)
    h = abs(deviation) * rstd
    # An error of one element moves the numerator by itself and the spread by as much at most.
    largest = np.max(size, -1, keepdims=True, initial=0)
    h_size = h + largest * rstd * (1 + h)
    g = abs(douts[0] * weight)
    ds = rstd * (g + mean(g) + h_size * mean(g * h) + h * mean(g * h_size))
    # rstd's own error, relative to it: that of h.
    ds *= 1 + largest * rstd
    if residual is not None:
        ds = ds + abs(douts[1])
    every_row = tuple(range(x.ndim - 1))
    rows = int(np.prod(x.shape[:-1]))
    return {
        "x": (ds, width),
        "residual": (ds, width),
        "weight": ((abs(douts[0]) * h_size).sum(every_row), width + rows),
        "bias": (abs(douts[0]).sum(every_row), rows),
    }


def linear(x, weight, douts, bias=None, residual=None, *, activation=None):
    """Of an error of z, which is off by at most a share u of its magnitude, no activation's slope changes by more
    than as much of it: gelu's second derivative is 0.80 at most, gelu_new's 0.81, tanh's 0.77, silu's 0.5."""
    (dy,), M, (N, K) = douts, int(np.prod(x.shape[:-1])), weight.shape
    z = abs(x) @ abs(weight).T + (0 if bias is None else abs(bias))
    dz = (abs(dy) * (STEEPEST + z)).reshape(M, N)
    return {
        "x": ((dz @ abs(weight)).reshape(x.shape), N + K),
        "weight": (dz.T @ abs(x).reshape(M, K), M + K),
        "bias": (dz.sum(0), M + K),
        "residual": (abs(dy), 1),
    }


def norm_linear(
    x, norm_weight, norm_bias, weight, douts, bias=None, *, norm="layer", eps=1e-5, activation=None, with_x=False
):  # fmt: skip
    """The product's, then the norm's of what comes back to it."""
    h = normed(x, norm_weight, norm_bias, norm, eps)
    product = linear(h.magnitude, weight, douts[:1], bias, activation=activation)
    dh, length = product["x"]
    sizes = _norm(x, norm_weight, [dh], None, eps, center=norm == "layer")
    behind = {"x": "x", "norm_weight": "weight", "norm_bias": "bias"}
    found = {name: (sizes[own][0], sizes[own][1] + length) for name, own in behind.items()}
    if with_x:
        found["x"] = (found["x"][0] + abs(douts[1]), found["x"][1])
    return found | {name: product[name] for name in ("weight", "bias")}


def matmul(a, b, douts):
    dy = abs(douts[0])
    da, db = dy @ abs(b).swapaxes(-1, -2), abs(a).swapaxes(-1, -2) @ dy
    return {"a": (da, b.shape[-1]), "b": (db.sum(tuple(range(db.ndim - 2))) if b.ndim == 2 else db, a.size)}


def attention(
    q, k, v, douts, lengths=None, documents=None, *, causal=True, window=None, scale=None, return_lse=False
):  # fmt: skip
    """As the docstring of `kernels/attention/backward.py` has the gradients, with every term's absolute value."""
    (batch, new, heads, width), (keys, kv_heads) = q.shape, k.shape[1:3]
    factor = width**-0.5 if scale is None else scale
    lengths = np.full(batch, keys) if lengths is None else lengths
    position = lengths[:, None] - new + np.arange(new)
    j = np.arange(keys)
    visible = (j < lengths[:, None, None]) & (position >= 0)[..., None]
    if causal:
        visible &= j <= position[..., None]
    if window is not None:
        visible &= j > position[..., None] - window
    if documents is not None:
        run = np.concatenate([np.zeros((batch, 1), int), np.diff(documents) != 0], 1).cumsum(1)
        own = np.take_along_axis(run, position.clip(0, keys - 1), 1)
        visible &= own[..., None] == run[:, None]
    used = (j < lengths[:, None])[..., None, None]
    k, v = (np.where(used, x, 0).repeat(heads // kv_heads, 2) for x in (k, v))
    seen = visible[:, None]
    scores = np.where(seen, factor * np.einsum("bthd,bshd->bhts", q, k), -np.inf)
    sizes = np.where(seen, factor * np.einsum("bthd,bshd->bhts", abs(q), abs(k)), 0)
    # A score that is off by d changes its weight by a factor of exp(d), and the sum too.
    sizes = 1 + 2 * sizes.max(-1, keepdims=True, initial=0)
    largest = scores.max(-1, keepdims=True, initial=-1e30)
    p = np.exp(scores - largest)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    dout = abs(douts[0])
    dp = np.einsum("bthd,bshd->bhts", dout, abs(v))
    delta = (p * dp).sum(-1, keepdims=True) * sizes
    if return_lse:
        delta = delta + abs(douts[1])[..., None]
    # Rounded to 16 bits before the last products; float16's relative precision ends at 2**-14.
    p_size, ds = ((p * sizes + 2**-14) * seen, (p * sizes * (dp + delta) + 2**-14) * seen)
    by_group = (batch, keys, kv_heads, -1, width)
    length = max(width, keys, new) * heads // kv_heads
    return {
        "q": (factor * np.einsum("bhts,bshd->bthd", ds, abs(k)), length),
        "k": (factor * np.einsum("bhts,bthd->bshd", ds, abs(q)).reshape(by_group).sum(3), length),
        "v": (np.einsum("bhts,bthd->bshd", p_size, dout).reshape(by_group).sum(3), length),
    }


def packed_attention(qkv, douts, documents=None, **options):
    thirds = {name: qkv[:, :, i] for i, name in enumerate("qkv")}
    found = attention(**thirds, douts=douts, documents=documents, **options)
    return {"qkv": (np.stack([found[name][0] for name in "qkv"], 2), found["q"][1])}


def gelu(x, douts, *, approximate="tanh"):
    # The tanh form's slope has the term x sigmoid'(v) v'(x), |x v'(x)| <= 3 |v|, and |v| sigmoid'(v) < 0.3: all its
    # terms together are below 3, and an exponential of v errs by |v| of its value.
    return {"x": (3 * abs(douts[0]), 1)}


def swiglu(gate, up, douts):
    return {"gate": (3 * abs(douts[0] * up), 1), "up": (abs(douts[0] * gate), 1)}


def rope(x, positions, douts, **options):
    truth = true_rope(douts[0], positions, **options)
    return {"x": (truth.magnitude, truth.length)}  # of the same terms, with another sign


def embedding(ids, weight, douts, positions=None, position_weight=None):
    def summed(indices, table):
        total = np.zeros(table.shape)
        np.add.at(total, indices, abs(douts[0]))
        return total, max(1, indices.size)

    sizes = {"weight": summed(ids, weight)}
    return sizes if positions is None else sizes | {"position_weight": summed(positions, position_weight)}


GRADIENTS = {
    each.__name__: each
    for each in (
        *(layer_norm, rms_norm, linear, norm_linear, matmul, attention, packed_attention),
        *(gelu, swiglu, rope, embedding),
    )
}
