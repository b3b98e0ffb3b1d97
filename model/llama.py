"""LLaMA and Mistral: their tensors, their names in a checkpoint, and the forward pass.

As `model.gpt2` has them: written once, over arrays of NumPy or torch, by fused ops of `gpukernels`.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971: an RMS norm in front of each
half of a block and one behind the last, rotary positions, SwiGLU. Key-value heads shared by several query heads:
Ainslie et al., arXiv 2305.13245. Mistral's sliding window: Jiang et al., arXiv 2310.06825.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gpukernels import (
    attention,
    cached_attention,
    embedding,
    linear,
    linear_cross_entropy,
    norm_linear,
    rms_norm,
    rope,
    swiglu,
)
from model.cache import Cache
from model.forward import onto_stream, output_matrix
from model.llama_config import LlamaConfig
from model.names import HEAD
from model.parameters import Parameters, Slot, padded_rows
from model.rope import Rope

#: What transformers puts in front of every name but the head's, and what it calls the token table.
PREFIX, TABLE = "model.", "embed_tokens.weight"

#: What old checkpoints keep of the rotary positions.
BUFFER = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Our names of a block's layers -> the checkpoint's.
_LAYERS = {
    "norm1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "projection": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

# Products of the same input, which are one where their weights lie together.
_JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def slots(config: LlamaConfig, *, head: bool | None = None) -> Iterator[Slot]:
    """Every parameter of the model: our name, the checkpoint's, and the shape, (out, in) for products.

    `head` asks for an output matrix of its own; default where the config does not tie it.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    queries, keys = config.n_head * config.head_width, config.kv_heads * config.head_width
    padded = padded_rows(config.vocab_size)
    yield Slot("tokens.weight", TABLE, (config.vocab_size, width), padded=padded)
    halves = (
        ("norm1", {"q": (queries, width), "k": (keys, width), "v": (keys, width)}, "projection", (width, queries)),
        ("norm2", {"gate": (hidden, width), "up": (hidden, width)}, "down", (width, hidden)),
    )
    for layer in range(config.n_layer):

        def slot(ours: str, kind: str, shape: tuple[int, ...], layer: int = layer) -> Slot:
            joined = f"blocks.{layer}.{_JOINED[ours]}.{kind}" if ours in _JOINED else None
            return Slot(f"blocks.{layer}.{ours}.{kind}", f"layers.{layer}.{_LAYERS[ours]}.{kind}", shape, joined=joined)

        for biased, (norm, products, last, shape) in zip((config.attention_bias, config.mlp_bias), halves, strict=True):
            yield slot(norm, "weight", (width,))
            yield from (slot(ours, "weight", each) for ours, each in products.items())
            if biased:
                yield from (slot(ours, "bias", each[:1]) for ours, each in products.items())
            yield slot(last, "weight", shape)
            if biased:
                yield slot(last, "bias", shape[:1])
    yield Slot("norm.weight", "norm.weight", (width,))
    if not config.tie_word_embeddings if head is None else head:
        yield Slot("head.weight", HEAD, (config.vocab_size, width), padded=padded)


def live(config: LlamaConfig) -> int:
    """Numbers a token that live at once in the second half of a block, which is where most do.

    The block's input and what attention added to it; queries, keys and values, the first two also turned;
    attention's result; gate, up and what SwiGLU makes of them. The only block of a model has just the last
    position there.
    """
    width, heads, kv_heads = config.hidden_size, config.n_head, config.kv_heads
    if config.n_layer == 1:
        return 2 * width + (2 * heads + 3 * kv_heads) * config.head_width
    return 2 * width + 3 * (heads + kv_heads) * config.head_width + 3 * config.intermediate_size


def kept(config: LlamaConfig) -> int:
    """Numbers a token that a block keeps from forward to backward, on a GPU.

    Its input and what attention added to it, and both normed; queries and keys turned, values, attention's result;
    gate, up and what SwiGLU makes of them.
    """
    heads = 2 * (config.n_head + config.kv_heads) * config.head_width
    return 4 * config.hidden_size + heads + 3 * config.intermediate_size


def hidden_states(parameters: Parameters, config: LlamaConfig, ids, positions):
    """The residual stream (B, T, C) behind the last block, before the final norm: of tokens (B, T) and all before."""
    return blocks(parameters, config, embed(parameters, ids, positions), positions=positions)


def embed(parameters: Parameters, ids, positions):
    """(B, T, C) of token ids (B, T); where they stand, attention will know."""
    return embedding(ids, parameters.root["tokens.weight"], dtype=parameters.activation_dtype)


def blocks(
    parameters: Parameters,
    config: LlamaConfig,
    x,
    cache: Cache | None = None,
    *,
    last_only: bool = False,
    positions=None,
):
    """Every block, one after the other.

    Args:
        x: (B, T, C), embedded tokens.
        cache: the keys and values of what came before; takes those of these tokens. Its lengths
            already count the T new tokens. None: the tokens are all there is.
        last_only: of the last position alone, with a cache. The last block then computes keys and values for
            all positions, and everything behind them for one.
        positions: (B, T), where the tokens stand, without a cache; with one its lengths say so.

    Returns:
        (B, T, C), or (B, 1, C).
    """
    if cache is not None:
        positions = cache.newest(x.shape[1])
    for layer, p in enumerate(parameters.blocks):
        last = last_only and layer == config.n_layer - 1
        x = block(p, config, layer, x, cache, positions=positions, last_only=last)
    return x


def block(
    p: Mapping,
    config: LlamaConfig,
    layer: int,
    x,
    cache: Cache | None = None,
    *,
    positions,
    last_only: bool = False,
    documents=None,
    drop: Callable | None = None,
):
    """One block: x (B, T, C) -> (B, T, C), or (B, 1, C), from the parameters of that block alone.

    `positions` (B, T) is where the tokens stand. `documents` (B, T), where there is no cache: tokens see those of
    their own run of equal numbers only. `drop` is applied, in training, to what attention and what the MLP would add
    to the residual stream.
    """

    q, k, v = _queries_keys_values(p, config, x, positions)
    if last_only:
        q, x = q[:, -1:], x[:, -1:]  # the queries are the tail of the keys
    options = {"window": config.sliding_window, "scale": config.attention_scale}
    if cache is None:
        y = attention(q, k, v, documents=documents, **options)
    else:
        y = cached_attention(q, k, v, *cache.layer(layer), cache.lengths, arrivals=cache.arrivals, **options)
    x = onto_stream(p, "projection", y.reshape(*x.shape[:2], config.n_head * config.head_width), x, drop)
    return onto_stream(p, "down", swiglu(*_gate_and_up(p, config, x)), x, drop)


def _queries_keys_values(p: Mapping, config: LlamaConfig, x, positions):
    """(B, T, H, D) and twice (B, T, Hkv, D), queries and keys turned to where they stand."""
    turn = functools.partial(
        rope, positions=positions, theta=config.rope.rope_theta, frequencies=_frequencies(config, x)
    )
    products = _products(p, config, x, "norm1", ("q", "k", "v"))
    products = [
        each.reshape(*each.shape[:2], each.shape[2] // config.head_width, config.head_width) for each in products
    ]
    if len(products) == 3:
        q, k, v = products
        return turn(q), turn(k), v
    (qkv,), turned = products, config.n_head + config.kv_heads
    qk = turn(qkv[:, :, :turned])
    return qk[:, :, : config.n_head], qk[:, :, config.n_head :], qkv[:, :, turned:]


def _gate_and_up(p: Mapping, config: LlamaConfig, x):
    """Twice (B, T, F)."""
    products = _products(p, config, x, "norm2", ("gate", "up"))
    if len(products) == 2:
        return products
    (gate_up,), hidden = products, config.intermediate_size
    return gate_up[..., :hidden], gate_up[..., hidden:]


def _products(p: Mapping, config: LlamaConfig, x, norm: str, names: tuple[str, ...]) -> list:
    """The products of the normed x with several weights; one, where these lie together."""
    scale, eps, joined = p[f"{norm}.weight"], config.rms_norm_eps, _JOINED[names[0]]
    if f"{joined}.weight" in p:
        return [norm_linear(x, scale, None, p[f"{joined}.weight"], p.get(f"{joined}.bias"), norm="rms", eps=eps)]
    x = rms_norm(x, scale, eps=eps)
    return [linear(x, p[f"{name}.weight"], p.get(f"{name}.bias")) for name in names]


def _frequencies(config: LlamaConfig, x):
    """(D / 2,) float32 where x is; None for the default ones, which the op has itself."""
    if config.frequencies is None or isinstance(x, np.ndarray):
        return config.frequencies
    return _on_device(config.rope, config.head_width, x.device)


@functools.cache  # for good: a captured graph reads them where they are
def _on_device(positions: Rope, width: int, device):
    import torch

    return torch.from_numpy(positions.frequencies(width)).to(device)


def unembed(parameters: Parameters, config: LlamaConfig, x):
    """Logits (..., V) of hidden states (..., C)."""
    root = parameters.root
    head = parameters.padded[output_matrix(root)]
    logits = norm_linear(x, root["norm.weight"], None, head, norm="rms", eps=config.rms_norm_eps)
    return logits[..., : config.vocab_size]


def loss(parameters: Parameters, config: LlamaConfig, x, targets, *, reduction: str = "sum"):
    """The cross entropy of hidden states (..., C) with the tokens that follow, (...), -100 where none counts.

    The logits of all tokens are never in memory on a GPU: see `gpukernels.linear_cross_entropy`.
    """
    root = parameters.root
    x = rms_norm(x, root["norm.weight"], eps=config.rms_norm_eps)
    return linear_cross_entropy(x, root[output_matrix(root)], targets, reduction=reduction)
