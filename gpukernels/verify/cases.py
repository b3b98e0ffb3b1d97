"""What every op is verified with: shapes around its blocks, options, and values that are hard to get right."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

#: By dtype, for the arrays that may be so: large, without a sum of products reaching infinity.
HUGE = {"float16": 2.0**7, "bfloat16": 2.0**40, "float32": 2.0**40}
#: By dtype: below the normal numbers.
DENORMAL = {"float16": 2.0**-20, "bfloat16": 2.0**-130, "float32": 2.0**-135}


class Case(NamedTuple):
    """One call of an op."""

    name: str
    arrays: dict[str, torch.Tensor]
    options: Mapping[str, Any] = MappingProxyType({})


class Draw(NamedTuple):
    """Where arrays of a case come from, and of what dtype they are."""

    dtype: str
    device: torch.device
    quick: bool  # only the small cases

    def floats(self, *shape: int, seed: int = 0, dtype: str | None = None) -> torch.Tensor:
        """Normally distributed, and so different for every seed and shape."""
        values = np.random.default_rng([seed, *shape]).standard_normal(shape)
        return torch.tensor(values).to(self.device, getattr(torch, dtype or self.dtype))

    def positive(self, *shape: int, seed: int = 0, dtype: str = "float32") -> torch.Tensor:
        return self.floats(*shape, seed=seed, dtype=dtype).abs() + 0.1

    def below(self, most: int, *shape: int, seed: int = 0, dtype: str = "int64") -> torch.Tensor:
        values = np.random.default_rng([seed, most, *shape]).integers(0, most, shape)
        return self.ints(values, dtype)

    def ints(self, values: Any, dtype: str = "int32") -> torch.Tensor:
        return torch.tensor(np.asarray(values)).to(self.device, getattr(torch, dtype))

    def named(self, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name: self.floats(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}

    def several(self, small: list, large: list) -> list:
        """The small ones, and the large ones too unless it is to be quick."""
        return small if self.quick else small + large


def norms(draw: Draw, *, bias: bool) -> Iterator[Case]:
    shapes = [(5, 129), (1, 1), (17, 33), (2, 3, 768), (0, 5), (2, 16385)]
    large = [(1, 16), (300, 40), (64, 1600), (3, 4097), (2, 8193), (4096, 768)]

    def given(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        more = {"bias": shape[-1:]} if bias else {}
        return draw.named(x=shape, weight=shape[-1:], **more)

    for shape in draw.several(shapes, large):
        yield Case(f"x {shape}", given(shape), {"eps": 1e-5})
        if shape in (*shapes[:3], shapes[-1]):
            yield Case(f"x {shape}, residual", given(shape) | {"residual": draw.floats(*shape, seed=9)}, {"eps": 0.1})
    if draw.dtype == "float32":  # 16 bits have no such numbers
        for shape in (shapes[0], shapes[-1]):
            yield Case(f"x {shape}, a mean of 4096", given(shape) | {"x": draw.floats(*shape) + 4096}, {"eps": 1e-5})


def linears(draw: Draw) -> Iterator[Case]:
    """More rows than `few_rows` takes, where there is no gradient, and fewer."""
    shapes = [(70, 33, 40), (1, 7, 129), (5, 40, 200), (0, 8, 8), (65, 1, 1)]
    large = [(64, 257, 768), (129, 136, 72), (300, 1032, 264), (1024, 2304, 768), (8, 50257, 768), (77, 768, 3072)]
    for M, N, K in draw.several(shapes, large):
        given = draw.named(x=(M, K), weight=(N, K), bias=(N,), residual=(M, N))
        plain = {name: given[name] for name in ("x", "weight")}
        activations = ("gelu_new", "gelu", "relu", "silu", "tanh") if shapes[0] == (M, N, K) else ("gelu_new",)
        for activation in activations:
            yield Case(f"{M} x {K} -> {N}, {activation}", given, {"activation": activation})
        yield Case(f"{M} x {K} -> {N}", plain)


def norm_linears(draw: Draw) -> Iterator[Case]:
    for M, N, K in draw.several([(5, 40, 200), (1, 7, 129), (70, 33, 40)], [(64, 2304, 768), (300, 257, 1600)]):
        given = draw.named(x=(M, K), norm_weight=(K,), norm_bias=(K,), weight=(N, K), bias=(N,))
        yield Case(f"{M} x {K} -> {N}", given, {"activation": "gelu_new"})
        if not draw.quick or M == 5:
            yield Case(f"{M} x {K} -> {N}, eps 0.1", given, {"eps": 0.1})
        rms = {"norm": "rms", "norm_bias": None, "eps": 1e-6, "with_x": True}
        yield Case(f"{M} x {K} -> {N}, RMS norm", {name: given[name] for name in ("x", "norm_weight", "weight")}, rms)


def matmuls(draw: Draw) -> Iterator[Case]:
    small = [((37, 70), (70, 29)), ((3, 5, 24), (3, 24, 17)), ((2, 1, 1), (1, 1)), ((4, 0), (0, 6))]
    large = [
        ((257, 1000), (1000, 129)),
        ((4096, 40), (40, 1032)),
        ((8, 130, 72), (8, 72, 40)),
        ((128, 4096), (4096, 64)),
    ]
    for a, b in draw.several(small, large):
        yield Case(f"{a} @ {b}", {"a": draw.floats(*a), "b": draw.floats(*b, seed=1)})


def attentions(draw: Draw) -> Iterator[Case]:
    # Batch, queries, heads, width, keys, heads of keys.
    small = [(2, 9, 2, 16, 21, 1), (1, 1, 1, 8, 1, 1), (1, 37, 1, 40, 70, 1)]
    large = [
        (1, 65, 2, 64, 65, 2),
        (1, 3, 2, 40, 129, 2),
        (2, 300, 4, 64, 300, 4),
        (1, 257, 8, 128, 513, 2),
        (2, 130, 2, 256, 130, 1),
        (1, 1024, 12, 64, 1024, 12),
    ]
    for B, T, H, D, S, kv in draw.several(small, large):
        given = draw.named(q=(B, T, H, D), k=(B, S, kv, D), v=(B, S, kv, D))
        # So that every block of keys has a larger score than the one before.
        given["k"] *= torch.linspace(0.5, 3, S).to(given["k"])[:, None, None]
        yield Case(f"{T} queries, {S} keys, {H} and {kv} heads of {D}", given)
    B, T, H, D, S, kv = small[0]
    given = draw.named(q=(B, T, H, D), k=(B, S, kv, D), v=(B, S, kv, D))
    yield Case("every key", given, {"causal": False})
    yield Case("a window of 9", given, {"window": 9})
    yield Case("a scale of 0.5, with lse", given, {"scale": 0.5, "return_lse": True})
    yield Case("queries of which all keys are masked", given | {"lengths": draw.ints([0, T - 5])})
    documents = np.stack([np.arange(S) // 16, np.arange(S) // 7])
    yield Case("documents", given | {"documents": draw.ints(documents)})


def packed_attentions(draw: Draw) -> Iterator[Case]:
    for shape in draw.several([(2, 21, 3, 2, 16), (1, 37, 3, 1, 40)], [(2, 300, 3, 4, 64), (1, 257, 3, 2, 128)]):
        yield Case(f"qkv {shape}", {"qkv": draw.floats(*shape)})
    qkv = {"qkv": draw.floats(2, 21, 3, 2, 16)}
    yield Case("a window of 9, a scale of 0.5", qkv, {"window": 9, "scale": 0.5})
    yield Case("every key", qkv, {"causal": False})
    yield Case("documents", qkv | {"documents": draw.ints(np.stack([np.arange(21) // 16, np.arange(21) // 7]))})


def decode_attentions(draw: Draw) -> Iterator[Case]:
    # Heads, heads of keys, width, capacity.
    # Of one head the interpreter's three multiprocessors share the keys, and of two that have the same keys.
    small = [(4, 2, 16, 70), (3, 3, 64, 129), (1, 1, 16, 200), (2, 1, 16, 200)]
    for H, kv, D, S in draw.several(small, [(32, 8, 128, 4097), (12, 12, 64, 1024)]):
        lengths = [0, 1, S // 2 + 1, S]
        given = {"q": draw.floats(4, H, D)}
        for seed, name in enumerate(("k", "v")):
            cache = draw.floats(4, kv, S, D, seed=seed)
            for row, length in enumerate(lengths):
                cache[row, :, length:] = torch.nan  # what is not in use may be anything
            given[name] = cache.transpose(1, 2)
        given["lengths"] = draw.ints(lengths)
        yield Case(f"{H} and {kv} heads of {D}, {S} keys, one row of none", given)
        yield Case(f"{H} and {kv} heads of {D}, a window", given, {"window": 5})


def cached_attentions(draw: Draw) -> Iterator[Case]:
    for H, kv, D, S, new in draw.several([(4, 2, 16, 70, 1), (2, 2, 24, 70, 9)], [(12, 12, 64, 1024, 300)]):
        given = draw.named(q=(3, new, H, D), k=(3, new, kv, D), v=(3, new, kv, D))
        for seed, name in enumerate(("keys", "values")):
            given[name] = draw.floats(3, kv, S, D, seed=7 + seed).transpose(1, 2)
        given["lengths"] = draw.ints([0, S // 2, S])
        yield Case(f"{new} new, {H} and {kv} heads of {D}, {S} keys", given)
        q, k, v = draw.floats(3, new, H + 2 * kv, D, seed=9).split([H, kv, kv], 2)
        slices = given | {"q": q, "k": k, "v": v}
        yield Case(f"{new} new, {H} and {kv} heads of {D}, slices of one product, a window", slices, {"window": 9})


def gelus(draw: Draw) -> Iterator[Case]:
    for shape in draw.several([(5, 129), (1,), (0, 3), (2, 2049)], [(1000, 3072), (7, 11008)]):
        for approximate in ("tanh", "none"):
            yield Case(f"x {shape}, {approximate}", {"x": 4 * draw.floats(*shape)}, {"approximate": approximate})


def swiglus(draw: Draw) -> Iterator[Case]:
    for shape in draw.several([(5, 129), (1, 1), (0, 3), (2, 2049)], [(1000, 3072), (7, 11008)]):
        yield Case(f"gate {shape}", draw.named(gate=shape, up=shape))


def ropes(draw: Draw) -> Iterator[Case]:
    for shape in draw.several([(2, 3, 5, 16), (1, 2, 3, 80), (0, 2, 2, 4)], [(2, 300, 32, 128)]):
        given = {"x": draw.floats(*shape), "positions": draw.below(5000, *shape[:2])}
        for interleaved in (False, True):
            yield Case(f"x {shape}{', interleaved' * interleaved}", given, {"interleaved": interleaved})
    far = {"x": draw.floats(1, 4, 2, 64), "positions": draw.ints([[105616, 2**24 + 1, -(2**31), 0]])}
    yield Case("far positions", far)


def embeddings(draw: Draw) -> Iterator[Case]:
    for shape, V, C in draw.several([((2, 9), 7, 40), ((3,), 5, 1025), ((0,), 3, 8)], [((4, 256), 50257, 768)]):
        given = {"ids": draw.below(V, *shape), "weight": draw.floats(V, C)}
        yield Case(f"{shape} ids of {V} rows of {C}", given)
        given |= {"positions": draw.below(9, *shape, seed=1), "position_weight": draw.floats(9, C, seed=1)}
        yield Case(f"{shape} ids of {V} rows of {C}, and positions", given)


def losses(draw: Draw) -> Iterator[Case]:
    for M, V in draw.several([(6, 37), (1, 1), (5, 1030)], [(70, 50257), (2, 128256)]):
        targets = draw.below(V, M)
        targets[1:2] = -100
        given = {"logits": 3 * draw.floats(M, V), "targets": targets}
        yield Case(f"{M} rows of {V}", given)
        options = {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "none"}
        yield Case(f"{M} rows of {V}, smoothed", given | {"weights": draw.positive(M)}, options)


def linear_losses(draw: Draw) -> Iterator[Case]:
    for M, V, C in draw.several([(6, 37, 16), (1, 1, 1)], [(130, 1030, 72), (256, 50257, 768)]):
        targets = draw.below(V, M)
        targets[1:2] = -100
        given = draw.named(hidden=(M, C), weight=(V, C)) | {"targets": targets}
        yield Case(f"{M} rows of {C}, {V} words", given)
        yield Case(f"{M} rows of {C}, {V} words, smoothed", given, {"label_smoothing": 0.1, "reduction": "sum"})


def optimizers(draw: Draw) -> Iterator[Case]:
    for size in draw.several([1, 2049], [100_003]):
        for step in (1, 1000):
            exact = draw.floats(size, dtype="float32")
            given = {"parameter": exact.to(getattr(torch, draw.dtype)), "gradient": draw.floats(size, seed=1)}
            given |= {
                "first_moment": 0.1 * draw.floats(size, seed=2, dtype="float32"),
                "second_moment": draw.positive(size, seed=3),
                "step": draw.ints([step]),
                "learning_rate": torch.full((1,), 0.5, device=draw.device),  # so that a wrong change shows
            }
            if draw.dtype != "float32":
                given["master"] = exact
            options = {"weight_decay": 0.1, "decayed": size // 2}
            yield Case(f"{size} parameters, step {step}", given, options)
            yield Case(f"{size} parameters, step {step}, eps 0.1", given, options | {"eps": 0.1})


def samples(draw: Draw) -> Iterator[Case]:
    """A row greedy, the others drawn, each with other settings."""
    for V in draw.several([37, 1030], [50257]):
        logits = 3 * draw.floats(5, V)
        yield Case(f"greedy, of {V}", {"logits": logits})
        given = {
            "logits": logits,
            "temperature": torch.tensor([0.7, 1.0, 0.0, 1.0, 2.0], device=draw.device),
            "top_k": draw.ints([0, 3, 0, 0, 5]),
            "top_p": torch.tensor([0.9, 1.0, 1.0, 0.5, 0.8], device=draw.device),
            "repetition_penalty": torch.tensor([1.0, 1.5, 1.5, 0.7, 1.5], device=draw.device),
            "seen": draw.below(2, 5, V).bool(),
            "seed": draw.ints([5] * 5),
            "stream": draw.ints(range(5)),
            "step": draw.ints([7] * 5),
        }
        yield Case(f"drawn, of {V}", given)


#: What `sample_embed` takes beside what `sample` does.
STEPPED = ("lengths", "weight", "position_weight", "x")


def sample_embeds(draw: Draw) -> Iterator[Case]:
    """Five rows, one of them not in use, one whose logits overflowed, one past the last position."""
    for case in samples(draw):
        logits = case.arrays["logits"].clone()
        logits[3, 4] = torch.nan
        given = case.arrays | {"logits": logits, "lengths": draw.ints([1, 0, 5, 3, 40])}
        given |= draw.named(weight=(logits.shape[1] + 2, 40), x=(5, 1, 40))
        yield Case(case.name, given)
        yield Case(f"{case.name}, and positions", given | draw.named(position_weight=(6, 40)))


def as_values(kind: str, case: Case, dtype: str, huge: tuple[str, ...]) -> Case:
    """The case with other values: "huge" for the arrays that may be, or "tiny", "zero" and -0 among usual ones."""
    arrays = dict(case.arrays)
    for name, array in case.arrays.items():
        if not array.is_floating_point() or str(array.dtype) != f"torch.{dtype}":
            continue
        if kind == "huge":
            arrays[name] = array * HUGE[dtype] if name in huge else array
            continue
        changed = array.clone()
        flat = changed.view(-1) if changed.is_contiguous() else changed.reshape(-1)
        for start, value in enumerate((DENORMAL[dtype], -DENORMAL[dtype], 0.0, -0.0)):
            flat[start::8] = value
        arrays[name] = flat.view(array.shape)
    return Case(f"{case.name}, {kind} values", arrays, case.options)


def laid_out(layout: str, lay: Callable[[torch.Tensor], torch.Tensor], case: Case, but: tuple[str, ...]) -> Case:
    """The case with its floating-point arrays of several dimensions otherwise in memory, but some."""
    arrays = {
        name: lay(array) if array.is_floating_point() and array.ndim > 1 and name not in but else array
        for name, array in case.arrays.items()
    }
    return Case(f"{case.name}, {layout}", arrays, case.options)
