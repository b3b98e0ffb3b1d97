"""GPT-2: its tensors, their names in a checkpoint, and the forward pass.

The forward pass is written once, over arrays of NumPy or torch, and calls fused ops of `gpukernels`
only; the arrays choose what runs. Activations are (B, T, C), heads (B, T, H, D).

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): a layer norm in front of
each half of a block, one behind the last, learned positions, and the token table as the output matrix.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from gpukernels import (
    cached_attention,
    embedding,
    layer_norm,
    linear_cross_entropy,
    norm_linear,
    packed_attention,
)
from model.cache import Cache
from model.forward import onto_stream, output_matrix
from model.gpt2_config import ACTIVATIONS, GPT2Config
from model.names import HEAD
from model.parameters import Parameters, Slot, padded_rows

# Our names of a block's layers -> the checkpoint's. The checkpoint's products are transformers'
# Conv1D, stored (in, out); `Slot.transposed` says so, and nothing is guessed from a shape: the square
# c_proj could not tell.
_LAYERS = {
    "norm1": "ln_1",
    "qkv": "attn.c_attn",
    "projection": "attn.c_proj",
    "norm2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}

#: Buffers of old checkpoints: the causal mask and what it writes. Never attn.c_attn.bias.
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

#: What transformers puts in front of every name but the head's, and what it calls the token table.
PREFIX, TABLE = "transformer.", "wte.weight"


def slots(config: GPT2Config, *, head: bool | None = None) -> Iterator[Slot]:
    """Every parameter of the model: our name, the checkpoint's, and the shape, (out, in) for products.

    `head` asks for an output matrix of its own; default where the config does not tie it.
    """
    width, hidden = config.n_embd, config.feed_forward_width
    padded = padded_rows(config.vocab_size)
    yield Slot("tokens.weight", TABLE, (config.vocab_size, width), padded=padded)
    yield Slot("positions.weight", "wpe.weight", (config.n_positions, width))
    products = {
        "qkv": (3 * width, width),
        "projection": (width, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    for layer in range(config.n_layer):
        for ours, theirs in _LAYERS.items():
            shape = products.get(ours, (width,))
            name, source = f"blocks.{layer}.{ours}", f"h.{layer}.{theirs}"
            yield Slot(f"{name}.weight", f"{source}.weight", shape, transposed=ours in products)
            yield Slot(f"{name}.bias", f"{source}.bias", shape[:1])
    yield Slot("norm.weight", "ln_f.weight", (width,))
    yield Slot("norm.bias", "ln_f.bias", (width,))
    if not config.tie_word_embeddings if head is None else head:
        yield Slot("head.weight", HEAD, (config.vocab_size, width), padded=padded)


def live(config: GPT2Config) -> int:
    """Numbers a token that live at once in the second half of a block, which is where most do.

    The block's input and what attention added to it, queries, keys and values, attention's result, the normed
    input of the product, and the product. The only block of a model has just the last position there.
    """
    return 5 * config.n_embd if config.n_layer == 1 else 7 * config.n_embd + config.feed_forward_width


def kept(config: GPT2Config) -> int:
    """Numbers a token that a block keeps from forward to backward, on a GPU.

    Its input and what attention added to it, queries, keys and values, attention's result, the up product before and
    behind the activation. Norms are computed again.
    """
    return 6 * config.n_embd + 2 * config.feed_forward_width


def hidden_states(parameters: Parameters, config: GPT2Config, ids, positions):
    """The residual stream (B, T, C) behind the last block, before the final norm: of tokens (B, T) and all before."""
    return blocks(parameters, config, embed(parameters, ids, positions))


def embed(parameters: Parameters, ids, positions):
    """(B, T, C) of token ids (B, T) and where they stand, (B, T)."""
    root = parameters.root
    return embedding(
        ids,
        root["tokens.weight"],
        positions=positions,
        position_weight=root["positions.weight"],
        dtype=parameters.activation_dtype,
    )


def blocks(parameters: Parameters, config: GPT2Config, x, cache: Cache | None = None, *, last_only: bool = False):
    """Every block, one after the other.

    Args:
        x: (B, T, C), embedded tokens.
        cache: the keys and values of what came before; takes those of these tokens. Its lengths
            already count the T new tokens. None: the tokens are all there is.
        last_only: of the last position alone, with a cache. The last block then computes keys and values for
            all positions, and everything behind them for one.

    Returns:
        (B, T, C), or (B, 1, C).
    """
    for layer, block_parameters in enumerate(parameters.blocks):
        x = block(block_parameters, config, layer, x, cache, last_only=last_only and layer == config.n_layer - 1)
    return x


def block(
    p: Mapping,
    config: GPT2Config,
    layer: int,
    x,
    cache: Cache | None = None,
    *,
    last_only: bool = False,
    positions=None,
    documents=None,
    drop: Callable | None = None,
):
    """One block: x (B, T, C) -> (B, T, C), or (B, 1, C), from the parameters of that block alone.

    `positions` (B, T) are in x since it was embedded. `documents` (B, T), where there is no cache: tokens see those of
    their own run of equal numbers only. `drop` is applied, in training, to what attention and what the MLP would add
    to the residual stream.
    """

    batch, new, _ = x.shape
    eps = config.layer_norm_epsilon

    qkv, x = norm_linear(x, p["norm1.weight"], p["norm1.bias"], p["qkv.weight"], p["qkv.bias"], eps=eps, with_x=True)
    qkv = qkv.reshape(batch, new, 3, config.n_head, config.head_width)
    scale = config.attention_scale(layer)
    if cache is None:
        y = packed_attention(qkv, scale=scale, documents=documents)
    else:
        q, k, v = _thirds(qkv)
        if last_only:
            q, x = q[:, -1:], x[:, -1:]  # the queries are the tail of the keys
        y = cached_attention(q, k, v, *cache.layer(layer), cache.lengths, scale=scale, arrivals=cache.arrivals)
    x = onto_stream(p, "projection", y.reshape(x.shape), x, drop)

    up, x = norm_linear(
        x,
        p["norm2.weight"],
        p["norm2.bias"],
        p["up.weight"],
        p["up.bias"],
        eps=eps,
        activation=ACTIVATIONS[config.activation_function],
        with_x=True,
    )
    return onto_stream(p, "down", up, x, drop)


def _thirds(qkv):
    """q, k and v of (B, T, 3, H, D); unbind is torch's quickest way."""
    return qkv.unbind(2) if hasattr(qkv, "unbind") else (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])


def unembed(parameters: Parameters, config: GPT2Config, x):
    """Logits (..., V) of hidden states (..., C)."""
    root = parameters.root
    head = parameters.padded[output_matrix(root)]
    logits = norm_linear(x, root["norm.weight"], root["norm.bias"], head, eps=config.layer_norm_epsilon)
    return logits[..., : config.vocab_size]


def loss(parameters: Parameters, config: GPT2Config, x, targets, *, reduction: str = "sum"):
    """The cross entropy of hidden states (..., C) with the tokens that follow, (...), -100 where none counts.

    The logits of all tokens are never in memory on a GPU: see `gpukernels.linear_cross_entropy`.
    """
    root = parameters.root
    x = layer_norm(x, root["norm.weight"], root["norm.bias"], eps=config.layer_norm_epsilon)
    return linear_cross_entropy(x, root[output_matrix(root)], targets, reduction=reduction)
