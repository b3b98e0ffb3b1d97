"""Products: both kernels, every epilogue, forward and backward, against float64."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DOT_KINDS, HALF, LAYOUTS, SINGLE, check_gradients, ids
from truth import ACTIVATIONS, STEEPEST, bound, check, host, true_matmul

import gpukernels
from gpukernels import library
from gpukernels.kernels import matmul, matmul_backward, matmul_tiles
from gpukernels.kernels.device import INTERPRETING, Gpu, gpu
from gpukernels.kernels.matmul_tiles import ProductTile

kinds = pytest.mark.parametrize("kind", DOT_KINDS, ids=ids)
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


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that small arrays already fill: 32 rows, and 32 columns or, from 64 columns on, 64."""
    monkeypatch.setattr(matmul_tiles, "_POINTER", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_POINTER_SINGLE", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_DESCRIPTOR", ProductTile(32, 32, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_DESCRIPTOR_WIDE", ProductTile(32, 64, 16, 4, 3))
    monkeypatch.setattr(matmul_tiles, "_WIDE", 64)
    monkeypatch.setattr(matmul, "GROUP_M", 2)


small = pytest.mark.usefixtures("small_tiles")

# (M, N, K). 16-byte rows are 8 columns of float16: below, at and above the tiles, with descriptors and without.
SHAPES = [
    *[(1, 1, 1), (1, 8, 8), (7, 5, 3), (31, 33, 15), (32, 32, 16), (33, 31, 17), (2, 97, 65)],
    *[(31, 24, 24), (33, 40, 8), (97, 72, 40), (5, 136, 48)],
    *[(0, 8, 8), (8, 0, 8), (8, 8, 0)],
]
shapes = pytest.mark.parametrize(("M", "N", "K"), SHAPES)


def arrays(kind, M, N, K, *left_out):
    given = kind.draws(x=(M, K), weight=(N, K), bias=(N,), residual=(M, N))
    return {name: array for name, array in given.items() if name not in left_out}


def magnitudes(x, weight, douts, bias=None, residual=None):
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


def matmul_magnitudes(a, b, douts):
    dy = abs(douts[0])
    da, db = dy @ abs(b).swapaxes(-1, -2), abs(a).swapaxes(-1, -2) @ dy
    return {"a": (da, b.shape[-1]), "b": (db.reshape(-1, *db.shape[-2:]).sum(0) if b.ndim == 2 else db, a.size)}


@small
@shapes
@kinds
def test_linear(kernel, kind, M, N, K):
    for left_out in ((), ("bias",), ("residual",), ("bias", "residual")):
        check("linear", arrays(kind, M, N, K, *left_out), activation="gelu_new")
    check("linear", arrays(kind, M, N, K))


@small
@shapes
@kinds
def test_the_gradients_of_linear(kernel, kind, M, N, K):
    check_gradients("linear", arrays(kind, M, N, K), magnitudes, activation="gelu_new")
    check_gradients("linear", arrays(kind, M, N, K, "bias"), magnitudes)
    check_gradients("linear", arrays(kind, M, N, K, "residual"), magnitudes)


@small
@activations
@kinds
def test_every_activation(kernel, kind, activation):
    for M, N, K in ((33, 40, 24), (17, 19, 5)):
        check("linear", arrays(kind, M, N, K), activation=activation)
        check_gradients("linear", arrays(kind, M, N, K), magnitudes, activation=activation)


@pytest.mark.parametrize(("M", "N", "K"), [(127, 120, 72), (128, 128, 64), (136, 264, 56), (257, 1032, 136)])
def test_the_real_tiles(kernel, M, N, K):
    for kind in (HALF, SINGLE) if N < 1000 else (HALF,):
        check("linear", arrays(kind, M, N, K), activation="gelu")
        check_gradients("linear", arrays(kind, M, N, K), magnitudes, activation="gelu")


@small
@layouts
@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (0, 2)], ids=str)
def test_linear_takes_any_strides_and_leading_dimensions(kernel, layout, leading):
    given = HALF.draws(x=(*leading, 40), weight=(24, 40), bias=(24,), residual=(*leading, 24))
    laid_out = {name: LAYOUTS[layout](array) if array.ndim > 1 else array for name, array in given.items()}
    laid_out["bias"] = given["bias"].repeat_interleave(2)[::2]
    check("linear", laid_out, activation="silu")
    check_gradients("linear", laid_out, magnitudes, layout=layout, activation="silu")


@small
@pytest.mark.parametrize("way", ["every second", "one for all"])
def test_operands_without_neighbouring_elements(kernel, way):
    def strided(x):
        if way == "one for all":
            return x.flatten()[:1].expand(x.shape)
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]

    given = {name: strided(array) for name, array in arrays(HALF, 33, 40, 24).items() if array.ndim > 1}
    check("linear", given, activation="gelu")
    check_gradients("linear", given, magnitudes, activation="gelu")
    y = gpukernels.linear(given["x"], given["weight"].requires_grad_())
    (dweight,) = torch.autograd.grad(y.sum(), given["weight"])  # an upstream gradient of one element
    error = abs(host(dweight) - host(given["x"]).sum(0))
    assert (error <= bound("float16", 33, abs(host(given["x"])).sum(0))).all()


BATCHES = [((3, 5), (5, 7)), ((2, 3, 33, 24), (24, 40)), ((2, 3, 33, 24), (2, 3, 24, 40)), ((1, 1, 1), (1, 1, 1))]
BATCHES += [((0, 3, 4), (0, 4, 5)), ((2, 0, 4), (4, 8)), ((2, 3, 0), (2, 0, 5))]


@small
@kinds
@layouts
@pytest.mark.parametrize(("a", "b"), BATCHES)
def test_matmul(kernel, kind, layout, a, b):
    given = {name: LAYOUTS[layout](array) for name, array in kind.draws(a=a, b=b).items()}
    check("matmul", given)
    check_gradients("matmul", given, matmul_magnitudes, layout=layout)


@small
def test_every_pair_of_storage_orders(kernel):
    for a, b in ((True, True), (True, False), (False, True), (False, False)):
        given = HALF.draws(a=(40, 24), b=(24, 72))
        check("matmul", {"a": given["a"] if a else given["a"].T.contiguous().T, "b": given["b"]} if b else given)
        given = {name: x if rows else x.T.contiguous().T for (name, x), rows in zip(given.items(), (a, b), strict=True)}
        check("matmul", given)
        check_gradients("matmul", given, matmul_magnitudes)


@small
def test_operands_of_two_dtypes_meet_in_float32(kernel):
    for x, weight in ((SINGLE, HALF), (HALF, SINGLE)):
        given = arrays(weight, 33, 24, 40) | {"x": x.draw(33, 40)}
        check("linear", given, result_dtype=x.dtype, activation="gelu")
        check_gradients("linear", given, magnitudes, activation="gelu")
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


@small
@kinds
def test_the_same_bits_every_time_and_whatever_the_neighbours(kernel, kind):
    given = {name: array.requires_grad_() for name, array in arrays(kind, 97, 72, 64).items()}
    runs = []
    for _ in range(2):
        y = gpukernels.linear(**given, activation="gelu")
        runs.append([y, *torch.autograd.grad(y, list(given.values()), y.detach())])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    for rows in (slice(5, 6), slice(40, 97)):
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


def test_z_is_saved_only_where_a_gradient_will_need_it(kernel, monkeypatch):
    saved, op = [], library.matmul._linear
    monkeypatch.setattr(library.matmul, "_linear", lambda *args: saved.append(args[-1]) or op(*args))
    given = arrays(SINGLE, 3, 4, 5)
    gpukernels.linear(**given, activation="gelu")
    wanted = {name: array.requires_grad_() for name, array in given.items()}
    gpukernels.linear(**wanted, activation="gelu")
    gpukernels.linear(**wanted)
    with torch.no_grad():
        gpukernels.linear(**wanted, activation="gelu")
    gpukernels.linear(**{name: array.detach() for name, array in given.items()} | {"residual": given["residual"]})
    assert saved == [False, True, False, False, False]
    y, _ = op(*wanted.values(), "gelu", None, False) if False else op(
        wanted["x"], wanted["weight"], wanted["bias"], "gelu", wanted["residual"], False
    )
    with pytest.raises(RuntimeError, match="an activation's gradient needs save_z=True"):
        y.sum().backward()
