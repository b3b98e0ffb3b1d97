"""What `bench.kernels` measures: ops at the shapes that GPT-2 (small to XL) and LLaMA-7B give them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Inputs = dict[str, torch.Tensor]


class Draw:
    """Makes inputs on a device from a seed; on `meta` they have shapes and no values."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0):
        self.device, self._dtype = device, dtype
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, spread: float = 1.0) -> torch.Tensor:
        x = torch.empty(shape, dtype=self._dtype, device=self.device)
        return x if self._generator is None else x.normal_(0, spread, generator=self._generator)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x if self._generator is None else x.random_(0, high, generator=self._generator)

    def full(self, value: float, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)


class Case(NamedTuple):
    """One op at one shape."""

    op: str  # a key of `bench.rivals.OPS`
    model: str
    shape: str  # as tables print it
    size: int  # rows, positions or elements, for who plots the JSON
    dtype: torch.dtype
    inputs: Callable[[Draw], Inputs]
    leaves: tuple[str, ...] = ()  # what gradients are taken of; none: forward only
    flops: int = 0  # of the products, forward
    backward_flops: int = 0
    quick: bool = False  # one of those that --quick keeps
    judged: int | None = None  # so many leading rows of each array have a truth: all would not fit the memory
    gathered: str | None = None  # the table of which only the rows that are asked for are read
    kept: tuple[str, ...] | None = None  # the inputs that a backward pass reads; None: all
    joint: bool = False  # the forward pass makes the gradients: backward alone is nothing

    @property
    def name(self) -> str:
        return f"{self.op} {self.model} {self.shape}"

    @property
    def directions(self) -> tuple[str, ...]:
        if not self.leaves:
            return ("forward",)
        return ("forward", "both") if self.joint else ("forward", "backward", "both")

    def draw(self, device: str, seed: int = 0) -> Inputs:
        return self.inputs(Draw(device, self.dtype, seed))


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
VOCABULARY = 50304  # GPT-2's 50257, padded to a multiple of 64

#: Width, heads and feed-forward width by model.
_WIDTHS = {
    "GPT-2": (768, 12, 3072),
    "GPT-2 medium": (1024, 16, 4096),
    "GPT-2 large": (1280, 20, 5120),
    "GPT-2 XL": (1600, 25, 6400),
    "LLaMA-7B": (4096, 32, 11008),
}


def attention(model: str, batch: int, new: int, **options) -> Case:
    width, heads, _ = _WIDTHS[model]
    head = width // heads

    def inputs(draw: Draw) -> Inputs:
        # As the projection leaves them, side by side in one array.
        return dict(zip("qkv", draw.normal(batch, new, 3, heads, head).unbind(2), strict=True))

    # Half of the scores are masked; the backward pass makes five products of their size for the forward's two.
    flops = 2 * batch * heads * new * new * head
    dtype = BRAIN if model == "LLaMA-7B" else HALF
    more = {"leaves": ("q", "k", "v"), "flops": flops, "backward_flops": flops * 5 // 2, "judged": 1}
    return Case("attention", model, f"B {batch}, T {new}, H {heads}, D {head}", new, dtype, inputs, **more, **options)


def decode_attention(model: str, rows: int, keys: int, **options) -> Case:
    width, heads, _ = _WIDTHS[model]
    head = width // heads

    def inputs(draw: Draw) -> Inputs:
        k, v = (draw.normal(rows, heads, keys, head).transpose(1, 2) for _ in range(2))
        lengths = draw.full(keys, rows, dtype=torch.int32)
        return {"q": draw.normal(rows, heads, head), "k": k, "v": v, "lengths": lengths}

    shape = f"B {rows}, S {keys}, H {heads}, D {head}"
    return Case("decode_attention", model, shape, rows, HALF, inputs, flops=4 * rows * heads * keys * head, **options)


def norm(op: str, model: str, rows: int, **options) -> Case:
    width = _WIDTHS[model][0]

    def inputs(draw: Draw) -> Inputs:
        arrays = {"x": draw.normal(rows, width), "weight": draw.normal(width)}
        return arrays | ({"bias": draw.normal(width)} if op == "layer_norm" else {})

    leaves = ("x", "weight", "bias") if op == "layer_norm" else ("x", "weight")
    return Case(op, model, f"{rows} x {width}", rows, HALF, inputs, leaves=leaves, **options)


def product(op: str, model: str, rows: int, N: int, K: int, **options) -> Case:
    """linear, linear_gelu, few_rows (with bias), norm_linear (with both) or rms_norm_linear (with none)."""
    few = op in ("few_rows", "norm_linear", "rms_norm_linear")

    def inputs(draw: Draw) -> Inputs:
        arrays = {"x": draw.normal(rows, K)}
        if op.endswith("norm_linear"):
            arrays["norm_weight"] = draw.normal(K)
        if op == "norm_linear":
            arrays["norm_bias"] = draw.normal(K)
        arrays["weight"] = draw.normal(N, K, spread=K**-0.5)
        return arrays if op in ("linear", "rms_norm_linear") else arrays | {"bias": draw.normal(N)}

    leaves = {"linear": ("x", "weight"), "linear_gelu": ("x", "weight", "bias")}.get(op, ())
    flops = 2 * rows * N * K
    size = rows if few else N
    more = {"leaves": leaves, "flops": flops, "backward_flops": 2 * flops}
    return Case(op, model, f"{rows} x {K} -> {N}", size, HALF, inputs, **more, **options)


def _products() -> list[Case]:
    cases = []
    for model in ("GPT-2", "GPT-2 XL", "LLaMA-7B"):
        width, _, inner = _WIDTHS[model]
        rows = 8192 if model != "LLaMA-7B" else 4096
        shapes = [(3 * width, width), (width, width), (inner, width), (width, inner)]
        shapes += [(VOCABULARY, width)] if model == "GPT-2" else []
        cases += [product("linear", model, rows, N, K, quick=(N, K) == (2304, 768)) for N, K in shapes]
    for model in ("GPT-2", "GPT-2 medium", "GPT-2 large", "GPT-2 XL"):
        width, _, inner = _WIDTHS[model]
        cases.append(product("linear_gelu", model, 8192, inner, width, quick=model == "GPT-2"))
    return cases


def _few_rows() -> list[Case]:
    width, _, inner = _WIDTHS["GPT-2"]
    cases = []
    for rows in (1, 8, 64):
        for N, K in ((3 * width, width), (width, width), (inner, width), (width, inner), (VOCABULARY, width)):
            cases.append(product("few_rows", "GPT-2", rows, N, K, quick=(rows, N) == (1, 2304)))
    for rows in (1, 8, 64):
        cases.append(product("norm_linear", "GPT-2", rows, 3 * width, width, quick=rows == 1))
        cases.append(product("norm_linear", "GPT-2 XL", rows, 4800, 1600))
    # Queries, keys and values: with the norm in the prologue, and by itself.
    for rows in (1, 64):
        cases.append(product("rms_norm_linear", "TinyLlama", rows, 2560, 2048, quick=rows == 1))
        cases.append(product("rms_norm_linear", "LLaMA-7B", rows, 12288, 4096))
    cases.append(product("few_rows", "LLaMA-7B", 1, 11008, 4096))
    return cases


def rope(batch: int, new: int, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        positions = torch.arange(new, device=draw.device).expand(batch, new)
        return {"x": draw.normal(batch, new, 32, 128), "positions": positions}

    more = {"leaves": ("x",), "kept": ("positions",)}
    return Case("rope", "LLaMA-7B", f"B {batch}, T {new}, H 32, D 128", batch * new, HALF, inputs, **more, **options)


def swiglu(rows: int, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return {"gate": draw.normal(rows, 11008), "up": draw.normal(rows, 11008)}

    return Case("swiglu", "LLaMA-7B", f"{rows} x 11008", rows, HALF, inputs, leaves=("gate", "up"), **options)


def gelu(rows: int, **options) -> Case:
    return Case(
        "gelu", "GPT-2", f"{rows} x 3072", rows, HALF,
        lambda draw: {"x": draw.normal(rows, 3072)}, leaves=("x",), **options,
    )  # fmt: skip


def embedding(rows: int, vocabulary: int = VOCABULARY, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return {"ids": draw.integers(vocabulary, rows), "weight": draw.normal(vocabulary, 768)}

    more = {"leaves": ("weight",), "gathered": "weight", "kept": ("ids",)}
    return Case("embedding", "GPT-2", f"{rows} x 768", rows, HALF, inputs, **more, **options)


def cross_entropy(rows: int, vocabulary: int = VOCABULARY, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        return {"logits": draw.normal(rows, vocabulary), "targets": draw.integers(vocabulary, rows)}

    shape = f"{rows} x {vocabulary}"
    return Case("cross_entropy", "GPT-2", shape, rows, BRAIN, inputs, leaves=("logits",), **options)


def linear_cross_entropy(rows: int, vocabulary: int = VOCABULARY, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        arrays = {"hidden": draw.normal(rows, 768), "weight": draw.normal(vocabulary, 768, spread=768**-0.5)}
        return arrays | {"targets": draw.integers(vocabulary, rows)}

    flops = 2 * rows * 768 * vocabulary
    more = {"leaves": ("hidden", "weight"), "flops": flops, "backward_flops": 2 * flops, "joint": True}
    shape = f"{rows} x 768 -> {vocabulary}"
    return Case("linear_cross_entropy", "GPT-2", shape, rows, BRAIN, inputs, **more, **options)


def adamw(model: str, size: int, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        arrays = {name: draw.normal(size, spread=0.02) for name in ("parameter", "gradient", "first_moment")}
        second = draw.normal(size, spread=0.02)
        arrays["second_moment"] = second if second.is_meta else second.square_()
        # Past the first steps, where 1 - beta^step is float32's to lose.
        scalars = {"step": draw.full(100, 1, dtype=torch.int32), "learning_rate": draw.full(1e-3, 1, dtype=SINGLE)}
        return arrays | scalars

    return Case("adamw", model, f"{size / 1e6:.0f} M parameters", size, SINGLE, inputs, **options)


def sample(rows: int, vocabulary: int = VOCABULARY, **options) -> Case:
    def inputs(draw: Draw) -> Inputs:
        floats = {"temperature": 0.8, "top_p": 0.95}
        arrays = {name: draw.full(value, rows, dtype=SINGLE) for name, value in floats.items()}
        arrays |= {name: draw.full(50, rows, dtype=torch.int32) for name in ("top_k", "seed", "step")}
        stream = torch.arange(rows, device=draw.device, dtype=torch.int32)
        return {"logits": draw.normal(rows, vocabulary, spread=3.0), **arrays, "stream": stream}

    return Case("sample", "GPT-2", f"{rows} x {vocabulary}", rows, HALF, inputs, **options)


#: In the order of their worth, should the time end: attention, norms, products, what decodes, what trains.
CASES = (
    attention("GPT-2", 8, 1024, quick=True),
    attention("GPT-2", 16, 512),
    attention("GPT-2", 8, 2048),
    attention("GPT-2", 4, 4096),
    norm("layer_norm", "GPT-2", 32768, quick=True),
    norm("layer_norm", "GPT-2", 8192),
    norm("layer_norm", "GPT-2 XL", 32768),
    *_products(),
    *_few_rows(),
    cross_entropy(8192, quick=True),
    linear_cross_entropy(8192, quick=True),
    adamw("GPT-2", 124_439_808, quick=True),
    decode_attention("GPT-2", 1, 1024, quick=True),
    decode_attention("GPT-2", 8, 1024),
    decode_attention("GPT-2", 64, 1024),
    decode_attention("LLaMA-7B", 8, 4096),
    attention("GPT-2 medium", 8, 1024),
    attention("GPT-2 large", 8, 1024),
    attention("GPT-2 XL", 4, 1024),
    attention("LLaMA-7B", 1, 4096),
    norm("layer_norm", "GPT-2 medium", 32768),
    norm("layer_norm", "GPT-2 large", 32768),
    norm("rms_norm", "LLaMA-7B", 8192, quick=True),
    norm("rms_norm", "LLaMA-7B", 2048),
    swiglu(2048),
    swiglu(8192, quick=True),
    rope(2, 2048, quick=True),
    rope(2, 4096),
    gelu(8192, quick=True),
    embedding(8192, quick=True),
    cross_entropy(2048),
    linear_cross_entropy(2048),
    sample(1, quick=True),
    sample(64),
)


def chosen(ops: list[str] | None, *, quick: bool) -> list[Case]:
    """Of `CASES`, those of the ops named (all, for none), with `quick` one or two of each.

    Raises:
        ValueError: an op that is not there.
    """
    known = list(dict.fromkeys(case.op for case in CASES))
    for op in ops or ():
        if op not in known:
            raise ValueError(f"the op must be one of {', '.join(known)}, got {op!r}")
    return [case for case in CASES if (not ops or case.op in ops) and (case.quick or not quick)]
