"""Products: both kernels, every epilogue, forward and backward, against float64."""

import importlib

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, EMULATE, HALF, SINGLE, check_gradients
from truth import check

import gpukernels
from gpukernels.kernels import matmul, matmul_tiles
from gpukernels.kernels.device import INTERPRETING, Gpu, gpu
from gpukernels.kernels.matmul import _descriptor as descriptor
from gpukernels.kernels.matmul import long_product, product
from gpukernels.kernels.matmul_tiles import ProductTile
from gpukernels.verify.compare import host
from gpukernels.verify.layouts import LAYOUTS
from gpukernels.verify.truth import ACTIVATIONS, bound, true_matmul

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)

HERE = gpu()
KERNELS = ["pointers", "descriptors"]
if not INTERPRETING and not 90 <= HERE.capability < 120:
    KERNELS.remove("descriptors")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """The kernel that may be used: with descriptors wherever operands suit it, or never."""
    capability = {"pointers": 80, "descriptors": 90 if INTERPRETING else HERE.capability}[request.param]
    monkeypatch.setattr(matmul, "gpu", lambda: Gpu(capability, HERE.multiprocessors))
    return request.param


@pytest.fixture(autouse=True)
def no_few_rows(monkeypatch):
    """These arrays are small; without this, those without a gradient would be another kernel's."""
    monkeypatch.setattr(importlib.import_module("gpukernels.library.matmul"), "FEW", 0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that small arrays already fill: 32 rows, and 32 columns or, from 64 columns on, 64."""
    monkeypatch.setattr(matmul_tiles, "_POINTER", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_POINTER_SINGLE", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_DESCRIPTOR", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_DESCRIPTOR_WIDE", ProductTile(32, 64, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_WIDE", 64)
    monkeypatch.setattr(matmul, "GROUP_M", 2)


# float32 has no kernel with descriptors.
PAIRS = [(kernel, kind) for kernel in KERNELS for kind in DOT_KINDS if kernel == "pointers" or kind is not SINGLE]
pairs = pytest.mark.parametrize(("kernel", "kind"), PAIRS, indirect=["kernel"], ids=lambda of: getattr(of, "dtype", of))
small = pytest.mark.usefixtures("small_tiles")

# (M, N, K). 16-byte rows are 8 columns of float16: below, at and above the tiles, with descriptors and without.
SHAPES = [
    *[(1, 1, 1), (7, 5, 3), (31, 33, 15), (32, 32, 16), (33, 31, 17), (2, 65, 37)],
    *[(31, 24, 24), (33, 40, 8), (65, 72, 40), (5, 136, 48)],
    *[(0, 8, 8), (8, 0, 8), (8, 8, 0)],
]
shapes = pytest.mark.parametrize(("M", "N", "K"), SHAPES)


def arrays(kind, M, N, K, *left_out):
    given = kind.draws(x=(M, K), weight=(N, K), bias=(N,), residual=(M, N))
    return {name: array for name, array in given.items() if name not in left_out}


@small
@shapes
@pairs
def test_linear(kernel, kind, M, N, K):
    for left_out in ((), ("bias",), ("residual",), ("bias", "residual")):
        check("linear", arrays(kind, M, N, K, *left_out), activation="gelu_new")
    check("linear", arrays(kind, M, N, K))


@small
@shapes
@pairs
def test_the_gradients_of_linear(kernel, kind, M, N, K):
    check_gradients("linear", arrays(kind, M, N, K), activation="gelu_new")
    check_gradients("linear", arrays(kind, M, N, K, "bias"))
    check_gradients("linear", arrays(kind, M, N, K, "residual"))


@small
@activations
@pairs
def test_every_activation(kernel, kind, activation):
    for M, N, K in ((33, 40, 24), (17, 19, 5)):
        check("linear", arrays(kind, M, N, K), activation=activation)
        check_gradients("linear", arrays(kind, M, N, K), activation=activation)


@pytest.mark.parametrize(("M", "N", "K"), [(127, 120, 72), (128, 128, 64), (136, 264, 56), (129, 1032, 72)])
def test_the_real_tiles(kernel, M, N, K):
    for kind in (HALF, SINGLE) if N < 1000 else (HALF,):
        check("linear", arrays(kind, M, N, K), activation="gelu")
        check_gradients("linear", arrays(kind, M, N, K), activation="gelu")


@small
@layouts
@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (0, 2)], ids=str)
def test_linear_takes_any_strides_and_leading_dimensions(kernel, layout, leading):
    given = HALF.draws(x=(*leading, 40), weight=(24, 40), bias=(24,), residual=(*leading, 24))
    laid_out = {name: LAYOUTS[layout](array) if array.ndim > 1 else array for name, array in given.items()}
    laid_out["bias"] = given["bias"].repeat_interleave(2)[::2]
    check("linear", laid_out, activation="silu")
    check_gradients("linear", laid_out, layout=layout, activation="silu")


@small
@pytest.mark.parametrize("way", ["every second", "one for all"])
def test_operands_without_neighbouring_elements(kernel, way):
    def strided(x):
        if way == "one for all":
            return x.flatten()[:1].expand(x.shape)
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]

    given = {name: strided(array) for name, array in arrays(HALF, 33, 40, 24).items() if array.ndim > 1}
    check("linear", given, activation="gelu")
    check_gradients("linear", given, activation="gelu")
    y = gpukernels.linear(given["x"], given["weight"].requires_grad_())
    (dweight,) = torch.autograd.grad(y.sum(), given["weight"])  # an upstream gradient of one element
    error = abs(host(dweight) - host(given["x"]).sum(0))
    assert (error <= bound("float16", 33, abs(host(given["x"])).sum(0))).all()


BATCHES = [((3, 5), (5, 7)), ((2, 1, 33, 24), (24, 40)), ((2, 1, 33, 24), (2, 1, 24, 40)), ((1, 1, 1), (1, 1, 1))]
BATCHES += [((0, 3, 4), (0, 4, 5)), ((2, 0, 4), (4, 8)), ((2, 3, 0), (2, 0, 5))]


@small
@pairs
@pytest.mark.parametrize(("a", "b"), BATCHES)
def test_matmul(kernel, kind, a, b):
    check("matmul", kind.draws(a=a, b=b))
    check_gradients("matmul", kind.draws(a=a, b=b))


@small
@layouts
def test_matmul_takes_any_strides(kernel, layout):
    for a, b in (((2, 17, 24), (24, 40)), ((2, 17, 24), (2, 24, 8))):
        given = {name: LAYOUTS[layout](array) for name, array in HALF.draws(a=a, b=b).items()}
        check("matmul", given)
        check_gradients("matmul", given, layout=layout)


@small
def test_every_pair_of_storage_orders(kernel):
    for a, b in ((True, True), (True, False), (False, True), (False, False)):
        given = {"a": HALF.draw(40, 24) if a else HALF.draw(24, 40).T}
        given["b"] = HALF.draw(24, 72, seed=1) if b else HALF.draw(72, 24, seed=1).T
        check("matmul", given)
        check_gradients("matmul", given)


@small
@pytest.mark.parametrize("rows", ["padded", "padded but the last"])
def test_what_lies_behind_a_row_is_read_but_not_used(rows, monkeypatch):
    """Operands read along their rows: 37 of 48 elements, and those of the last row at the very end of the memory."""
    monkeypatch.setattr(matmul, "gpu", lambda: Gpu(80, HERE.multiprocessors))
    a, b = (HALF.draw(20, 37, seed=seed) for seed in (1, 2))
    padded = []
    for x in (a, b):
        memory = torch.full((20 * 48 - (11 if rows == "padded but the last" else 0),), torch.nan, dtype=x.dtype)
        padded.append(memory.to(DEVICE).as_strided((20, 37), (48, 1)).copy_(x))
    assert matmul._readable(padded[0].T, -2) == matmul._readable(padded[1], -1) == (48 if rows == "padded" else 37)
    assert torch.equal(product(padded[0].T, padded[1])[0], product(a.T, b)[0])


@small
def test_operands_of_two_dtypes_meet_in_float32(kernel):
    for x, weight in ((SINGLE, HALF), (HALF, SINGLE)):
        given = arrays(weight, 33, 24, 40) | {"x": x.draw(33, 40)}
        check("linear", given, result_dtype=x.dtype, activation="gelu")
        check_gradients("linear", given, activation="gelu")
    # 2**12 + 2**-12 is a float32 that float16 cannot hold, and 1 - 2**-11 a float16.
    x = torch.tensor([[2.0**12, 2.0**-12]], device=DEVICE)
    weight = torch.tensor([[1 - 2.0**-11, 1.0]], dtype=torch.float16, device=DEVICE)
    assert gpukernels.linear(x, weight).item() == 2.0**12 - 2 + 2.0**-12


def test_large_values_in_float16(kernel):
    # Sums pass 65504 on the way, and products too.
    signs = torch.tensor([1.0, -1.0], dtype=torch.float16, device=DEVICE)
    given = {"x": torch.full((3, 64), 3e4, dtype=torch.float16, device=DEVICE), "weight": HALF.draw(8, 64).sign()}
    given["weight"] = torch.cat((given["weight"], signs.repeat_interleave(32)[None].repeat(8, 1)))
    check("linear", given | {"bias": HALF.draw(16)}, activation="tanh")
    check("matmul", {"a": given["x"], "b": 300 * given["weight"][8:].T})
    check("linear", {"x": HALF.draw(3, 64, spread=2e3), "weight": HALF.draw(8, 64, spread=1e-2)}, activation="gelu")


@pytest.fixture
def wide_sums(monkeypatch):
    """Interpreted products add up in float64: BLAS adds in an order that may depend on a row's place in the tile."""
    if not INTERPRETING:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, *rest):
        found = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(found.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@small
@pairs
@pytest.mark.usefixtures("wide_sums")
def test_the_same_bits_every_time_and_whatever_the_neighbours(kernel, kind):
    given = {name: array.requires_grad_() for name, array in arrays(kind, 65, 40, 32).items()}
    runs = []
    for _ in range(2):
        y = gpukernels.linear(**given, activation="gelu")
        runs.append([y, *torch.autograd.grad(y, list(given.values()), y.detach())])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    for rows in (slice(5, 6), slice(40, 65)):
        alone = given | {name: given[name].detach()[rows].requires_grad_() for name in ("x", "residual")}
        y = gpukernels.linear(**alone, activation="gelu")
        assert torch.equal(y, runs[0][0][rows])
        (dx,) = torch.autograd.grad(y, alone["x"], y.detach())
        assert torch.equal(dx, runs[0][1][rows])


@small
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("bias",), ("residual",), ("x", "weight", "bias")], ids=str)
def test_only_the_gradients_that_are_asked_for(kernel, activation, frozen):
    given = arrays(SINGLE, 5, 24, 40)
    leaves = {name: array.clone().requires_grad_(name not in frozen) for name, array in given.items()}
    every = {name: array.clone().requires_grad_() for name, array in given.items()}
    for each in (leaves, every):
        y = gpukernels.linear(**each, activation=activation)
        y.backward(torch.ones_like(y))
    for name, array in leaves.items():
        assert array.grad is None if name in frozen else torch.equal(array.grad, every[name].grad)


def test_z_is_saved_only_where_a_gradient_will_need_it(monkeypatch):
    saved, forward = [], product.__globals__["_launch"]
    monkeypatch.setattr(matmul, "_launch", lambda *args: saved.append(args[5] is not None) or forward(*args))
    given = arrays(SINGLE, 3, 4, 5)
    wanted = {name: array.clone().requires_grad_() for name, array in given.items()}
    gpukernels.linear(**given, activation="gelu")
    gpukernels.linear(**wanted, activation="gelu")
    gpukernels.linear(**wanted)
    gpukernels.linear(**given | {"residual": wanted["residual"]}, activation="gelu")
    with torch.no_grad():
        gpukernels.linear(**wanted, activation="gelu")
    assert saved == [False, True, False, False, False]


def test_a_gradient_without_the_z_it_needs_is_refused():
    op = torch.ops.gpukernels.linear
    x, weight = SINGLE.draw(3, 5).requires_grad_(), SINGLE.draw(4, 5)
    with pytest.raises(RuntimeError, match="an activation's gradient needs save_z=True"):
        op(x, weight, None, "gelu", None, False)[0].sum().backward()


def long_product_is_right(a, b, *, dtype, **options):
    truth = true_matmul(host(a), host(b))
    value, magnitude = truth.value, truth.magnitude
    if options.get("accumulate"):
        before = host(options["out"])
        value, magnitude = value + before, magnitude + abs(before)
    found = long_product(a, b, **options)
    assert str(found.dtype) == f"torch.{dtype}"
    error = abs(host(found) - value)
    assert (error <= bound(dtype, truth.length, magnitude)).all()
    return found


@small
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_a_split_sum(kernel, parts, monkeypatch):
    """Parts of whole blocks of K, whose last one may be short, or end inside a block; columns of 16 bytes and not."""
    monkeypatch.setattr(matmul, "splits", lambda tiles, steps, gpu: parts)
    for (M, N, K), kind in (((40, 24, 112), HALF), ((40, 8, 120), HALF), ((33, 7, 116), HALF), ((5, 24, 113), SINGLE)):
        a, b = kind.draw(K, M).T, kind.draw(K, N, seed=1)
        long_product_is_right(a, b, dtype=kind.dtype)
        found = long_product_is_right(a, b, dtype="float32", out_dtype=torch.float32)
        assert torch.equal(found, long_product(a, b, out_dtype=torch.float32))
        for out in (SINGLE.draw(M, N, seed=2), kind.draw(M, 2 * N, seed=2)[:, :N]):
            dtype = str(out.dtype).removeprefix("torch.")
            assert long_product_is_right(a, b, dtype=dtype, out=out, accumulate=True) is out
            assert long_product_is_right(a, b, dtype=dtype, out=out) is out


def test_gpt2s_gradients_are_split_to_fill_an_h100():
    h100 = Gpu(90, 132)
    assert all(matmul_tiles.splits(tiles, 128, h100) == 1 for tiles in (0, 132, 2358))
    assert matmul_tiles.splits(36, 0, h100) == 1
    assert [matmul_tiles.splits(36, rows // 64, h100) for rows in (512, 8192, 65536)] == [1, 3, 7]
    # Of 16384 rows: queries, keys and values, which fill 108 of 132 at once; and each half of the MLP.
    assert [matmul_tiles.splits(tiles, 16384 // 64, h100) for tiles in (108, 144)] == [1, 4]


@small
@pytest.mark.parametrize("rows", [1, 2])
def test_a_result_of_padded_rows(kernel, rows):
    """A view of a single row may lose its stride, which descriptors must have in 16 bytes."""
    a, b, out = HALF.draw(rows, 16), HALF.draw(50, 16).T, HALF.draw(rows, 64)[:, :50]
    product(a, b, out=out)
    truth = true_matmul(host(a), host(b))
    assert (abs(host(out) - truth.value) <= bound("float16", truth.length, truth.magnitude)).all()


@small
def test_a_product_is_added_to_a_float32_total(kernel):
    a, b = HALF.draw(33, 24), HALF.draw(24, 40)
    total = SINGLE.draw(33, 40)
    truth, before = true_matmul(host(a), host(b)), host(total)
    out, z = product(a, b, residual=total, out=total)
    assert out is total
    assert z is None
    error = abs(host(total) - before - truth.value)
    assert (error <= bound("float32", truth.length, truth.magnitude + abs(before))).all()


def test_descriptors_are_for_rows_of_16_bytes_on_gpus_that_have_them(monkeypatch):
    used = []
    monkeypatch.setattr(matmul, "_descriptor", lambda *args: used.append(True) or descriptor(*args))
    if not INTERPRETING:
        pytest.skip("the GPU is what it is")

    def uses(a, b, capability=90, **options):
        used.clear()
        monkeypatch.setattr(matmul, "gpu", lambda: Gpu(capability, 3))
        product(a, b, **options)
        return bool(used)

    a, b, wide = HALF.draw(8, 16), HALF.draw(16, 24), HALF.draw(8, 32)
    assert uses(a, b)
    assert uses(a, b, 100)
    assert uses(wide[:, 8:24], HALF.draw(24, 16).T, residual=HALF.draw(8, 24))
    assert not uses(a, b, 80)
    assert not uses(a, b, 120)  # 99 KiB of shared memory
    assert not uses(a.float(), b.float())
    assert not uses(a.float(), b)
    assert not uses(a[None], b[None])
    assert not uses(wide[:, 1:17], b)
    assert not uses(HALF.draw(8, 17)[:, :16], b)
    assert not uses(wide.as_strided((8, 16), (8, 1)), b)  # rows that overlap
    assert not uses(a, HALF.draw(16, 20))
    assert not uses(a, b, residual=HALF.draw(8, 25)[:, 1:])
    assert not uses(a, b, out=HALF.draw(8, 25)[:, :24])
    assert not uses(a[:, :0], b[:0])


@pytest.mark.skipif(EMULATE > 0, reason="the emulator keeps a record of every byte")
def test_offsets_past_32_bits(kernel):
    """Rows and columns 2**30 elements apart, in memory that is reserved and not used."""

    def far(x):
        return torch.empty_strided(x.shape, (2**30 + 8, 1), dtype=x.dtype, device=x.device).copy_(x)

    given = HALF.draws(x=(4, 8), weight=(4, 8), residual=(4, 8))
    weight = far(HALF.draw(8, 4)).T
    check("linear", {"x": far(given["x"]), "weight": weight[:, :8], "residual": given["residual"][:, :4]})
    check("linear", {"x": given["x"], "weight": far(given["weight"]), "residual": far(given["residual"])[:, :4]})
    out = far(given["x"])[:, :4]
    product(given["x"], given["weight"].T, out=out)
    truth = true_matmul(host(given["x"]), host(given["weight"]).T)
    assert (abs(host(out) - truth.value) <= bound("float16", 8, truth.magnitude)).all()
