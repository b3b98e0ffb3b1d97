"""What the ops refuse, in which words, and what they must not refuse: any strides, narrower weights, no terms.

NumPy and torch refuse the same calls with the same words, before anything is computed.
"""

import numpy as np
import pytest
import torch
from kinds import KINDS, both
from refusals import NO_FLOAT, NO_INT, makers, refuses
from truth import Kind, check

import gpukernels
from gpukernels import adamw, attention, cached_attention, embedding, layer_norm, linear, matmul, norm_linear
from gpukernels.verify.compare import host

NO_NORM = "x must be (..., C) with C of 1 or more"
NO_ACTIVATION = "activation must be one of gelu, gelu_new, relu, silu, tanh, or None"
NO_DTYPE = "must be a floating-point dtype"
NO_HEADS = "q must be (B, T, H, D) with H and D of 1 or more"
ALONE = "positions and position_weight go together, got only"


def qkv(f, *, q=(2, 3, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8)):
    return {"q": f(*q), "k": f(*k), "v": f(*v)}


# By op: the call, where f(*shape) makes floats and i(*values) integers; the error; its message.
REFUSED = {
    layer_norm: [
        (lambda f, i: layer_norm(f(), f(1)), ValueError, f"{NO_NORM}, got ()"),
        (lambda f, i: layer_norm(f(3, 0), f(0)), ValueError, f"{NO_NORM}, got (3, 0)"),
        (lambda f, i: layer_norm(f(3, 4), f(5)), ValueError, "weight must be (4,) to match x, got (5,)"),
        (lambda f, i: layer_norm(f(3, 4), f(4), f(1, 4)), ValueError, "bias must be (4,) to match x, got (1, 4)"),
        (lambda f, i: layer_norm(f(4), f(4), eps=-1), ValueError, "eps must be a number, 0 or more, got -1"),
        (lambda f, i: layer_norm(f(4), f(4), eps=np.nan), ValueError, "eps must be a number, 0 or more, got nan"),
        (lambda f, i: layer_norm(f(4), f(4), eps=np.inf), ValueError, "eps must be a number, 0 or more, got inf"),
        (lambda f, i: layer_norm(f(4), f(4), eps="a"), ValueError, "eps must be a number, 0 or more, got 'a'"),
        (lambda f, i: layer_norm(f(4), f(4), eps=None), ValueError, "eps must be a number, 0 or more, got None"),
        (
            lambda f, i: layer_norm(f(3, 4), f(4), residual=f(4)),
            ValueError,
            "residual must be (3, 4) to match x, got (4,)",
        ),
        (lambda f, i: layer_norm(i(3), f(1)), TypeError, f"x {NO_FLOAT}, got int32"),
        (lambda f, i: layer_norm(f(1), i(3)), TypeError, f"weight {NO_FLOAT}, got int32"),
        (lambda f, i: layer_norm(f(1), f(1), residual=i(3)), TypeError, f"residual {NO_FLOAT}, got int32"),
    ],
    linear: [
        (lambda f, i: linear(f(), f(2, 3)), ValueError, "x must be (..., 3) to match weight (2, 3), got ()"),
        (lambda f, i: linear(f(5, 4), f(2, 3)), ValueError, "x must be (..., 3) to match weight (2, 3), got (5, 4)"),
        (lambda f, i: linear(f(5, 3), f(3)), ValueError, "weight must be (N, K), got (3,)"),
        (lambda f, i: linear(f(5, 3), f(2, 3), f(3)), ValueError, "bias must be (2,) to match weight, got (3,)"),
        (
            lambda f, i: linear(f(3), f(2, 3), residual=f(3)),
            ValueError,
            "residual must be (2,) to match the result, got (3,)",
        ),
        (lambda f, i: linear(f(3), f(2, 3), activation="swish"), ValueError, f"{NO_ACTIVATION}, got 'swish'"),
        (lambda f, i: linear(f(3), i(1)), TypeError, f"weight {NO_FLOAT}, got int32"),
        (lambda f, i: linear(f(3), f(1, 3), i(1)), TypeError, f"bias {NO_FLOAT}, got int32"),
    ],
    norm_linear: [
        (lambda f, i: norm_linear(f(5, 0), f(0), None, f(2, 0)), ValueError, f"{NO_NORM}, got (5, 0)"),
        (
            lambda f, i: norm_linear(f(4), f(3), None, f(2, 4)),
            ValueError,
            "norm_weight must be (4,) to match x, got (3,)",
        ),
        (
            lambda f, i: norm_linear(f(4), f(4), f(3), f(2, 4)),
            ValueError,
            "norm_bias must be (4,) to match x, got (3,)",
        ),
        (
            lambda f, i: norm_linear(f(4), f(4), None, f(2, 3)),
            ValueError,
            "x must be (..., 3) to match weight (2, 3), got (4,)",
        ),
        (lambda f, i: norm_linear(f(4), f(4), None, f(4)), ValueError, "weight must be (N, K), got (4,)"),
        (
            lambda f, i: norm_linear(f(4), f(4), None, f(2, 4), f(4)),
            ValueError,
            "bias must be (2,) to match weight, got (4,)",
        ),
        (
            lambda f, i: norm_linear(f(4), f(4), None, f(2, 4), eps=-0.5),
            ValueError,
            "eps must be a number, 0 or more, got -0.5",
        ),
        (lambda f, i: norm_linear(f(4), f(4), None, f(2, 4), activation=3), ValueError, f"{NO_ACTIVATION}, got 3"),
        (lambda f, i: norm_linear(f(1), i(1), None, f(2, 1)), TypeError, f"norm_weight {NO_FLOAT}, got int32"),
        (
            lambda f, i: norm_linear(f(4), f(4), None, f(2, 4), norm="rms_norm"),
            ValueError,
            "norm must be one of layer, rms, got 'rms_norm'",
        ),
        (
            lambda f, i: norm_linear(f(4), f(4), f(4), f(2, 4), norm="rms"),
            ValueError,
            "norm_bias must be None with norm='rms', got (4,)",
        ),
    ],
    matmul: [
        (lambda f, i: matmul(f(3), f(3, 2)), ValueError, "a and b must have 2 dimensions or more, got (3,) and (3, 2)"),
        (lambda f, i: matmul(f(2, 3), f(3)), ValueError, "a and b must have 2 dimensions or more, got (2, 3) and (3,)"),
        (
            lambda f, i: matmul(f(4, 2, 3), f(5, 3, 2)),
            ValueError,
            "the leading dimensions of a and b must be equal, got (4, 2, 3) and (5, 3, 2)",
        ),
        (lambda f, i: matmul(f(2, 3), f(4, 2)), ValueError, "b must be (..., 3, N) to match a (2, 3), got (4, 2)"),
        (
            lambda f, i: matmul(f(2, 3), f(3, 2, dtype="float64")),
            TypeError,
            "b must have a's dtype float32, got float64",
        ),
        (lambda f, i: matmul(f(1, 1), i(1)), TypeError, f"b {NO_FLOAT}, got int32"),
    ],
    attention: [
        (lambda f, i: attention(**qkv(f, q=(3, 4, 8))), ValueError, "q must be (B, T, H, D), got (3, 4, 8)"),
        (
            lambda f, i: attention(**qkv(f, q=(2, 3, 4, 0), k=(2, 5, 2, 0), v=(2, 5, 2, 0))),
            ValueError,
            f"{NO_HEADS}, got (2, 3, 4, 0)",
        ),
        (lambda f, i: attention(**qkv(f, q=(2, 3, 0, 8))), ValueError, f"{NO_HEADS}, got (2, 3, 0, 8)"),
        (
            lambda f, i: attention(**qkv(f, k=(5, 2, 8))),
            ValueError,
            "k must be (2, S, Hkv, 8) to match q, got (5, 2, 8)",
        ),
        (
            lambda f, i: attention(**qkv(f, k=(1, 5, 2, 8))),
            ValueError,
            "k must be (2, S, Hkv, 8) to match q, got (1, 5, 2, 8)",
        ),
        (
            lambda f, i: attention(**qkv(f, k=(2, 5, 2, 4))),
            ValueError,
            "k must be (2, S, Hkv, 8) to match q, got (2, 5, 2, 4)",
        ),
        (lambda f, i: attention(**qkv(f, k=(2, 5, 3, 8))), ValueError, "k's heads must divide the 4 heads of q, got 3"),
        (lambda f, i: attention(**qkv(f, k=(2, 5, 0, 8))), ValueError, "k's heads must divide the 4 heads of q, got 0"),
        (
            lambda f, i: attention(**qkv(f, v=(2, 6, 2, 8))),
            ValueError,
            "v must be (2, 5, 2, 8) to match k, got (2, 6, 2, 8)",
        ),
        (
            lambda f, i: attention(**qkv(f) | {"k": f(2, 5, 2, 8, dtype="float16")}),
            TypeError,
            "k must have q's dtype float32, got float16",
        ),
        (
            lambda f, i: attention(**qkv(f) | {"v": f(2, 5, 2, 8, dtype="float64")}),
            TypeError,
            "v must have q's dtype float32, got float64",
        ),
        (lambda f, i: attention(**qkv(f) | {"v": i(5)}), TypeError, f"v {NO_FLOAT}, got int32"),
        (lambda f, i: attention(**qkv(f), window=0), ValueError, "window must be a whole number, 1 or more, got 0"),
        (lambda f, i: attention(**qkv(f), window=1.5), ValueError, "window must be a whole number, 1 or more, got 1.5"),
        (
            lambda f, i: attention(**qkv(f), window=True),
            ValueError,
            "window must be a whole number, 1 or more, got True",
        ),
        (lambda f, i: attention(**qkv(f), scale=0.0), ValueError, "scale must be a number above 0, got 0.0"),
        (lambda f, i: attention(**qkv(f), scale=np.nan), ValueError, "scale must be a number above 0, got nan"),
        (lambda f, i: attention(**qkv(f), scale="1"), ValueError, "scale must be a number above 0, got '1'"),
        (lambda f, i: attention(**qkv(f), documents=f(2, 5)), TypeError, f"documents {NO_INT}, got float32"),
        (
            lambda f, i: attention(**qkv(f), documents=i(5)),
            ValueError,
            "documents must be (2, 5) one number for each key, got (1,)",
        ),
        (lambda f, i: attention(**qkv(f), window=2, causal=False), ValueError, "window needs causal=True"),
        (
            lambda f, i: attention(**qkv(f, q=(2, 6, 4, 8))),
            ValueError,
            "q has 6 positions but k only 5; pass lengths for padding",
        ),
        (
            lambda f, i: attention(**qkv(f), lengths=i(5)),
            ValueError,
            "lengths must be (2,) one length for each row, got (1,)",
        ),
        (lambda f, i: attention(**qkv(f), lengths=i(5, 4, dtype="int16")), TypeError, f"lengths {NO_INT}, got int16"),
        (lambda f, i: attention(**qkv(f), lengths=f(2)), TypeError, f"lengths {NO_INT}, got float32"),
    ],
    embedding: [
        (lambda f, i: embedding(f(2), f(5, 3)), TypeError, f"ids {NO_INT}, got float32"),
        (lambda f, i: embedding(i(1, dtype="uint8"), f(5, 3)), TypeError, f"ids {NO_INT}, got uint8"),
        (lambda f, i: embedding(i(1), f(5)), ValueError, "weight must be (V, C), got (5,)"),
        (lambda f, i: embedding(i(1), f(5, 3), dtype=int), TypeError, f"dtype {NO_DTYPE}, got {int!r}"),
        (lambda f, i: embedding(i(1), i(1)), TypeError, f"weight {NO_FLOAT}, got int32"),
        (lambda f, i: embedding(i(1), f(5, 3), positions=i(1)), ValueError, f"{ALONE} positions"),
        (lambda f, i: embedding(i(1), f(5, 3), position_weight=f(4, 3)), ValueError, f"{ALONE} position_weight"),
        (
            lambda f, i: embedding(i(1), f(5, 3), positions=i(1, 2), position_weight=f(4, 3)),
            ValueError,
            "positions must be (1,) to match ids, got (2,)",
        ),
        (
            lambda f, i: embedding(i(1), f(5, 3), positions=f(1), position_weight=f(4, 3)),
            TypeError,
            f"positions {NO_INT}, got float32",
        ),
        (
            lambda f, i: embedding(i(1), f(5, 3), positions=i(1), position_weight=f(4, 2)),
            ValueError,
            "position_weight must be (P, 3) to match weight, got (4, 2)",
        ),
        (
            lambda f, i: embedding(i(1), f(5, 3), positions=i(1), position_weight=i(4)),
            TypeError,
            f"position_weight {NO_FLOAT}, got int32",
        ),
    ],
}
CASES = [
    pytest.param(call, error, f"{op.__name__}: {message}", id=f"{op.__name__} {message}")
    for op, cases in REFUSED.items()
    for call, error, message in cases
]


@both
@pytest.mark.parametrize(("call", "error", "message"), CASES)
@pytest.mark.usefixtures("computing_nothing")
def test_a_call_that_cannot_be_is_refused_in_words(library, call, error, message):
    refuses(lambda: call(*makers(library)), error, message)


@both
@pytest.mark.usefixtures("computing_nothing")
def test_a_missing_array_is_refused_by_name(library):
    """None stands for an option that is left out; an array that has to be there is not one."""
    f, _ = makers(library)
    calls = {
        "layer_norm: weight": lambda: layer_norm(f(4), None),
        "linear: weight": lambda: linear(f(4), None),
        "norm_linear: norm_weight": lambda: norm_linear(f(4), None, None, f(2, 4)),
        "matmul: b": lambda: matmul(f(2, 2), None),
        "attention: v": lambda: attention(f(1, 1, 1, 1), f(1, 1, 1, 1), None),
        "embedding: ids": lambda: embedding(None, f(2, 2)),
    }
    for named, call in calls.items():
        with pytest.raises(TypeError, match=f"^{named} "):
            call()


@pytest.mark.usefixtures("computing_nothing")
def test_arrays_of_different_kinds_or_devices_are_refused():
    (array, _), (tensor, _) = makers("numpy"), makers("torch")
    one_kind = "the arrays must be all numpy.ndarray, all torch.Tensor or all of CuPy, got"
    with pytest.raises(TypeError) as caught:
        linear(array(3), tensor(2, 3), array(2))
    assert str(caught.value) == f"linear: {one_kind} x numpy.ndarray, weight torch.Tensor, bias numpy.ndarray"
    with pytest.raises(TypeError) as caught:
        layer_norm([1.0], array(1))
    assert str(caught.value) == f"layer_norm: {one_kind} x builtins.list, weight numpy.ndarray"
    with pytest.raises(ValueError, match="one device") as caught:
        matmul(tensor(2, 2), tensor(2, 2).to("meta"))
    assert str(caught.value) == "matmul: the arrays must be on one device, got a on cpu, b on meta"


def test_numpy_checks_lengths_and_ids_by_value():
    f, i = makers("numpy")
    for lengths, got in (((5, -1), "-1 to 5"), ((6, 3), "3 to 6")):
        with pytest.raises(ValueError, match="lengths") as caught:
            attention(**qkv(f), lengths=i(*lengths))
        assert str(caught.value) == f"attention: lengths must be 0 to 5, got {got}"
    for ids, got in (((0, -1), "-1 to 0"), ((3, 5), "3 to 5")):
        with pytest.raises(IndexError) as caught:
            embedding(i(*ids), f(5, 3))
        assert str(caught.value) == f"embedding: ids must be 0 to 4, got {got}"
        with pytest.raises(IndexError) as caught:
            embedding(i(0, 1), f(5, 3), positions=i(*ids), position_weight=f(5, 3))
        assert str(caught.value) == f"embedding: positions must be 0 to 4, got {got}"


@pytest.mark.parametrize("ids", [(0, -1), (3, 5)])
def test_torch_refuses_an_id_outside_the_table_on_the_cpu(ids):
    f, i = makers("torch")
    with pytest.raises(IndexError):
        embedding(i(*ids), f(5, 3))


@pytest.mark.parametrize(("library", "dtype"), [("numpy", torch.float16), ("torch", np.float16), ("torch", "float16")])
def test_a_dtype_of_another_library_is_refused(library, dtype):
    f, i = makers(library)
    own = {"numpy": "numpy.dtype", "torch": "torch.dtype"}[library]
    words = f"embedding: dtype must be a {own}, as the arrays have, got {dtype!r}"
    refuses(lambda: embedding(i(1), f(5, 3), dtype=dtype), TypeError, words)


def test_numpy_arrays_that_cannot_be_written_are_refused_before_anything_is():
    f, i = makers("numpy")
    keys, values, new = f(1, 4, 2, 8), f(1, 4, 2, 8) * 2, f(1, 1, 2, 8) * 3
    values.flags.writeable = False
    words = "cached_attention: values is written, got a read-only array"
    refuses(lambda: cached_attention(new, new, new, keys, values, i(2)), ValueError, words)
    assert (keys == 1).all()
    state = {name: f(3) for name in ("parameter", "gradient", "first_moment", "second_moment")}
    state["gradient"].flags.writeable = False  # not written
    adamw(**state, step=i(1), learning_rate=f())
    before = {name: array.copy() for name, array in state.items()}
    state["second_moment"].flags.writeable = False
    words = "adamw: second_moment is written, got a read-only array"
    refuses(lambda: adamw(**state, step=i(1), learning_rate=f()), ValueError, words)
    assert all((state[name] == before[name]).all() for name in state)


def restrided(array, how):
    """The same values, stored otherwise."""
    if how == "transposed":
        axes = tuple(reversed(range(array.ndim)))
        if isinstance(array, torch.Tensor):
            return array.permute(axes).contiguous().permute(axes)
        return np.ascontiguousarray(array.T).T
    if how == "backwards":
        return np.flip(np.flip(array).copy())
    shape = (*array.shape[:-1], 2 * array.shape[-1] + 1)
    store = torch.full(shape, 9).to(array.dtype) if isinstance(array, torch.Tensor) else np.full(shape, 9, array.dtype)
    store[..., 1::2] = array
    return store[..., 1::2]


STRIDED = {  # shapes, and lists of integers
    "layer_norm": {"x": (2, 5, 6), "weight": (6,), "bias": (6,), "residual": (2, 5, 6)},
    "linear": {"x": (2, 5, 6), "weight": (9, 6), "bias": (9,), "residual": (2, 5, 9)},
    "norm_linear": {"x": (2, 5, 6), "norm_weight": (6,), "norm_bias": (6,), "weight": (9, 6)},
    "matmul": {"a": (2, 5, 6), "b": (2, 6, 3)},
    "attention": {"q": (2, 3, 4, 6), "k": (2, 7, 2, 6), "v": (2, 7, 2, 6), "lengths": [7, 4]},
    "packed_attention": {"qkv": (2, 5, 3, 2, 6)},
    "embedding": {"ids": [[1, 4]], "weight": (5, 6), "positions": [[2, 0]], "position_weight": (3, 6)},
}


STORAGE = [(kind, how) for kind in KINDS for how in ("transposed", "every second element")]
STORAGE += [(kind, "backwards") for kind in KINDS if kind.arrays == "numpy"]  # torch has no negative strides


@pytest.mark.parametrize("op", STRIDED)
@pytest.mark.parametrize(("kind", "how"), STORAGE)
def test_any_strides_will_do(kind, how, op):
    arrays = {name: kind.ints(of) if isinstance(of, list) else kind.draw(*of) for name, of in STRIDED[op].items()}
    arrays = {name: restrided(array, how) for name, array in arrays.items()}
    check(op, arrays)
    check(op, {name: array[:1] if array.shape[0] == 2 else array for name, array in arrays.items()})  # one row


@both
@pytest.mark.parametrize("stored", ["(out, in)", "transposed", "every second element"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_float16_weight_is_widened_exactly(library, stored, rows):
    x = Kind(library, "float32").draw(rows, 6)
    half = Kind(library, "float16").draws(
        weight=(9, 6), bias=(9,), residual=(rows, 9), norm_weight=(6,), norm_bias=(6,)
    )
    if stored != "(out, in)":
        half["weight"] = restrided(half["weight"], stored)
    check("linear", {"x": x, **{name: half[name] for name in ("weight", "bias", "residual")}}, activation="gelu")
    norm = {"x": x, **{name: half[name] for name in half if name != "residual"}}
    check("norm_linear", norm)
    check("norm_linear", {name: norm[name] for name in norm if name != "norm_bias"}, norm="rms", norm_bias=None)
    check("layer_norm", {"x": x, "weight": half["norm_weight"], "bias": half["norm_bias"], "residual": x})


@both
def test_a_product_of_no_terms_is_the_bias(library):
    bias = Kind(library, "float32").draw(3)
    result = gpukernels.linear(*Kind(library, "float32").draws(x=(2, 0), weight=(3, 0)).values(), bias)
    np.testing.assert_array_equal(host(result), [host(bias)] * 2)


@both
def test_a_loss_of_no_terms_is_that_of_equal_logits(library):
    kind = Kind(library, "float32")
    for reduction in ("mean", "sum", "none"):
        given = kind.draws(hidden=(2, 0), weight=(3, 0)) | {"targets": kind.ints([0, 2])}
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight")] if library == "torch" else []
        loss = gpukernels.linear_cross_entropy(**given, reduction=reduction)
        np.testing.assert_allclose(host(loss).mean(), np.log(3) * (2 if reduction == "sum" else 1), rtol=2**-22)
        for leaf in leaves:
            assert torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0].shape == leaf.shape
