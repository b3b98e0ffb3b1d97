"""What the compile tests record beside the steps of models (`model.workloads`): other sizes, dtypes and options."""

import contextlib

import torch

import gpukernels
from gpukernels.kernels.few_rows import few_rows
from gpukernels.kernels.matmul import long_product
from gpukernels.launches import dependent_launches
from model.workloads import WORKLOADS as STEPS
from model.workloads import backward, meta, optimizer_step


def norms(width, dtype):
    x, weight, bias, residual = (
        meta(*shape, dtype=dtype) for shape in [(8192, width), (width,), (width,), (8192, width)]
    )
    backward(gpukernels.layer_norm(x, weight, bias, residual=residual), [x, residual, weight, bias])
    backward([gpukernels.rms_norm(x, weight)], [x, weight])


def attention(heads, width, dtype=torch.float16, **options):
    q, k, v = meta(4, 1024, 3, heads, width, dtype=dtype).unbind(2)
    backward([gpukernels.attention(q, k, v, **options)], [q, k, v])


def attention_of_every_kind():
    """Grouped heads, a window, lengths and documents: everything that adds code."""
    q, k, v = meta(4, 256, 32, 128), meta(4, 1024, 8, 128), meta(4, 1024, 8, 128)
    lengths, documents = (meta(*shape, dtype=torch.int32, grad=False) for shape in [(4,), (4, 1024)])
    out = gpukernels.attention(q, k, v, window=512, lengths=lengths, documents=documents)
    backward([out], [q, k, v])


def products(dtype, *shapes):
    """Linears of 8192 rows, forward and backward: (N, K), an activation, and what else is fused."""
    for (N, K), activation, fused in shapes:
        x, weight = meta(8192, K, dtype=dtype), meta(N, K, dtype=dtype)
        more = {"bias": (N,), "residual": (8192, N)}
        more = {name: meta(*more[name], dtype=dtype) for name in fused}
        backward([gpukernels.linear(x, weight, **more, activation=activation)], [x, weight, *more.values()])


GPT2 = [((2304, 768), None, ["bias"]), ((3072, 768), "gelu_new", ["bias"]), ((768, 3072), None, ["bias", "residual"])]


def inference(dtype):
    with torch.no_grad():
        x, half = meta(128, 768, dtype=dtype), meta(3072, 768)
        gpukernels.linear(x, half, meta(3072), activation="gelu")
        gpukernels.matmul(meta(8, 64, 80, dtype=dtype), meta(8, 80, 64, dtype=dtype))  # a batch, and a short tail of K


def accumulation():
    """A chunk of a tied head's gradient, added to a float32 total."""
    total = meta(50304, 768, dtype=torch.float32, grad=False)
    long_product(meta(1024, 50304, grad=False).T, meta(1024, 768, grad=False), out=total, accumulate=True)
    long_product(meta(8192, 768, grad=False).T, meta(8192, 768, grad=False), out=total[:768], accumulate=True)


def few(M, N, K, *, norm=True, dtype=torch.float16, bias=True, **options):
    """One product of a decode step: after a norm, or with a residual. Without biases the norm is an RMS norm."""
    x, weight, norm_weight, residual = (
        meta(*shape, dtype=dtype, grad=False) for shape in ((M, K), (N, K), (K,), (M, N))
    )
    few_rows(
        x, weight, meta(N, dtype=dtype, grad=False) if bias else None, residual=None if norm else residual,
        norm=(norm_weight, norm_weight if bias else None, 1e-5, bias) if norm else None, **options,
    )  # fmt: skip


def few_rows_of_gpt2(C, dtype=torch.float16, M=1):
    few(M, 3 * C, C, dtype=dtype)
    few(M, C, C, norm=False, dtype=dtype)
    few(M, 4 * C, C, activation="gelu_new", dtype=dtype)
    few(M, C, 4 * C, norm=False, dtype=dtype)


def few_rows_of_llama():
    few(1, 4096, 4096, bias=False, dtype=torch.bfloat16)
    few(1, 4096, 11008, norm=False, bias=False, dtype=torch.bfloat16)


def few_rows_of_small_llamas():
    """With the norm in the prologue: SmolLM2 135M, and TinyLlama, of the most columns that have room; in float32."""
    few(1, 960, 576, bias=False)
    few(1, 3072, 576, bias=False)
    few(1, 2560, 2048, bias=False)
    few(1, 6400, 1600, bias=False, dtype=torch.float32)


def rms_norms_of_llama():
    """In front of products, and the gradient along the residual."""
    x, norm, weight = meta(4096, 4096, dtype=torch.bfloat16), meta(4096), meta(6144, 4096, dtype=torch.bfloat16)
    backward(gpukernels.norm_linear(x, norm, None, weight, norm="rms", with_x=True), [x, norm, weight])


def losses(width, padded, dtype, **options):
    logits, targets = meta(8192, padded, dtype=dtype)[:, :width], meta(8192, dtype=torch.int64, grad=False)
    weights = meta(8192, dtype=torch.float32, grad=False)
    backward([gpukernels.cross_entropy(logits, targets, **options)], [logits])
    gpukernels.cross_entropy_with_gradient(logits, targets, weights=weights, **options)


def decode_attention(heads, kv_heads, width, capacity, dtype):
    q, cache = (
        meta(1, heads, width, dtype=dtype, grad=False),
        meta(1, kv_heads, capacity, width, dtype=dtype, grad=False),
    )
    lengths = meta(1, dtype=torch.int32, grad=False)
    gpukernels.decode_attention(q, cache.transpose(1, 2), cache.transpose(1, 2), lengths)


def cached_attention(heads, kv_heads, width, capacity, dtype):
    """A token, in order and as a decode step launches it."""
    q, k = (meta(1, 1, each, width, dtype=dtype, grad=False) for each in (heads, kv_heads))
    cache = meta(1, kv_heads, capacity, width, dtype=dtype, grad=False).transpose(1, 2)
    lengths, arrivals = (meta(*shape, dtype=torch.int32, grad=False) for shape in ((1,), (1, heads)))
    for launches in (contextlib.nullcontext, dependent_launches):
        with launches():
            gpukernels.cached_attention(q, k, k, cache, cache, lengths, arrivals=arrivals)


def sample(vocabulary, padded, dtype, *, draw):
    logits = meta(1, padded, dtype=dtype, grad=False)[:, :vocabulary]
    floats = meta(1, dtype=torch.float32, grad=False)
    integers = meta(1, dtype=torch.int32, grad=False)
    options = dict.fromkeys(("temperature", "top_p", "min_p"), floats) if draw else {}
    options |= dict.fromkeys(("top_k", "seed", "stream", "step"), integers) if draw else {}
    seen = meta(1, padded, dtype=torch.bool, grad=False)[:, :vocabulary]
    options |= {"repetition_penalty": floats, "seen": seen}
    gpukernels.sample(logits, **options)
    table, x = meta(padded, 768, dtype=dtype, grad=False), meta(1, 1, 768, dtype=dtype, grad=False)
    gpukernels.sample_embed(logits, **options, lengths=integers, weight=table, position_weight=table[:1024], x=x)


def gelus(width, dtype):
    x = meta(8, 1024, width, dtype=dtype)
    for approximate in ("tanh", "none"):
        backward([gpukernels.gelu(x, approximate=approximate)], [x])


def swiglus(width, dtype):
    gate, up = meta(4, 2048, 2 * width, dtype=dtype).chunk(2, -1)
    backward([gpukernels.swiglu(gate, up)], [gate, up])


def turns(shape, dtype, **options):
    """Queries and keys of a packed projection."""
    batch, new, _, heads, width = shape
    qkv, positions = meta(*shape, dtype=dtype), meta(batch, new, dtype=torch.int64, grad=False)
    q = qkv[:, :, :2].reshape(batch, new, 2 * heads, width)
    backward([gpukernels.rope(q, positions, **options)], [q])


#: By name: what is launched. Together they reach every kernel. A step of 8 or 64 rows has the code of one.
WORKLOADS = {
    **{name: STEPS[name] for name in ("gpt2/prefill", "gpt2/decode-1", "gpt2/training")},
    "norms of GPT-2 XL": lambda: norms(1600, torch.bfloat16),
    "norms of rows wider than registers": lambda: norms(20000, torch.float32),
    "attention of GPT-2 in float32": lambda: attention(12, 64, torch.float32),
    "attention of LLaMA": lambda: attention(32, 128, torch.bfloat16),
    "attention, 256 wide": lambda: attention(8, 256),
    "attention of every kind": attention_of_every_kind,
    "products in float32, of a float16 weight": lambda: inference(torch.float32),
    "products in float16, without gradients": lambda: inference(torch.float16),
    "gradients that add up": accumulation,
    "few rows of GPT-2 XL": lambda: few_rows_of_gpt2(1600),
    "few rows of GPT-2 in float32": lambda: few_rows_of_gpt2(768, torch.float32),
    "few rows of GPT-2 XL in float32": lambda: few_rows_of_gpt2(1600, torch.float32),
    "few rows of LLaMA": few_rows_of_llama,
    "few rows of small LLaMAs": few_rows_of_small_llamas,
    "RMS norms of LLaMA, in front of products": rms_norms_of_llama,
    "losses of GPT-2": lambda: losses(50257, 50304, torch.bfloat16),
    "losses of GPT-2 in float32, smoothed": lambda: losses(50304, 50304, torch.float32, label_smoothing=0.1),
    "losses of a small vocabulary": lambda: losses(256, 256, torch.float16, z_loss=1e-4),
    "AdamW of GPT-2": lambda: optimizer_step(124_439_808, torch.float32),
    "decode attention of GPT-2": lambda: decode_attention(12, 12, 64, 1024, torch.float16),
    "decode attention of Llama 3": lambda: decode_attention(32, 8, 128, 8192, torch.bfloat16),
    "decode attention of wide heads": lambda: decode_attention(8, 4, 256, 8192, torch.float32),
    "cached attention of Llama 3": lambda: cached_attention(32, 8, 128, 8192, torch.bfloat16),
    "cached attention of wide heads": lambda: cached_attention(8, 4, 256, 8192, torch.float32),
    "sampling for Llama 3": lambda: sample(128256, 128256, torch.float32, draw=True),
    "greedy choice for GPT-2": lambda: sample(50257, 50304, torch.float32, draw=False),
    "GELU of GPT-2": lambda: gelus(3072, torch.float16),
    "SwiGLU of LLaMA-2 7B, packed": lambda: swiglus(11008, torch.bfloat16),
    "RoPE of LLaMA-2 7B": lambda: turns((2, 4096, 3, 32, 128), torch.bfloat16),
    "RoPE of LLaMA-2 7B, one position": lambda: turns((1, 1, 3, 32, 128), torch.float16),
    "RoPE of a quarter of each head": lambda: turns(
        (2, 2048, 3, 16, 64), torch.float32, frequencies=meta(8, dtype=torch.float32, grad=False)
    ),
    "RoPE of neighbours": lambda: turns((2, 2048, 3, 16, 64), torch.float16, interleaved=True),
}
