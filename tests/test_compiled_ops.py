"""Every public op inside `torch.compile`: checks and all, one graph has it whole, and says no warning.

Runs where `test_registration` does.
"""

import pytest
import torch
from kernel_cases import DEVICE, SINGLE

import gpukernels

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

RTOL, ATOL = 1e-3, 1e-3  # eager against compiled: the same kernels, in float16 at worst
draw = SINGLE.draw

# Dynamo's are; Inductor says on a GPU that float32 could be less exact.
without_a_warning = pytest.mark.filterwarnings("error::UserWarning", "ignore:TensorFloat32 tensor cores:UserWarning")


def positions(*shape):
    return SINGLE.ints(torch.arange(shape[-1]).expand(shape), "int64")


#: Calls of the public ops, by name and case: checks and all, a compiled graph has them whole.
PUBLIC = {
    "attention": lambda: (draw(2, 5, 4, 16), draw(2, 7, 2, 16), draw(2, 7, 2, 16)),
    "attention, documents": lambda: (draw(2, 5, 4, 16), draw(2, 5, 2, 16), draw(2, 5, 2, 16)),
    "cross_entropy": lambda: (draw(4, 9), positions(4)),
    "cross_entropy_with_gradient": lambda: (draw(4, 9), positions(4)),
    "decode_attention": lambda: (draw(1, 4, 16), draw(1, 7, 2, 16), draw(1, 7, 2, 16), positions(3)[2:]),
    "embedding": lambda: (positions(2, 4), draw(5, 8)),
    "gelu": lambda: (draw(4, 8),),
    "layer_norm": lambda: (draw(4, 8), draw(8), draw(8)),
    "linear": lambda: (draw(4, 8), draw(3, 8), draw(3)),
    "linear_cross_entropy": lambda: (draw(4, 8), draw(9, 8), positions(4)),
    "matmul": lambda: (draw(4, 8), draw(8, 3)),
    "norm_linear": lambda: (draw(4, 8), draw(8), None, draw(3, 8)),
    "norm_linear, rms": lambda: (draw(4, 8), draw(8), None, draw(3, 8)),
    "packed_attention": lambda: (draw(2, 7, 3, 2, 16),),
    "rms_norm": lambda: (draw(4, 8), draw(8)),
    "rope": lambda: (draw(1, 4, 2, 8), positions(1, 4)),
    "sample": lambda: (draw(4, 8),),
    "swiglu": lambda: (draw(4, 8), draw(4, 8)),
    "uniform": lambda: (positions(3), positions(3), positions(3)),
}
OPTIONS = {
    "attention, documents": {"documents": SINGLE.ints([[0, 0, 1, 1, 1], [4, 3, 3, 3, 4]])},
    "norm_linear, rms": {"norm": "rms"},
}


#: The same for ops that write into their arguments, by name.
WRITING = {
    "adamw": lambda: {
        **{name: draw(20).abs() for name in ("parameter", "gradient", "first_moment", "second_moment")},
        "step": SINGLE.ints([2]),
        "learning_rate": draw(1),
        "weight_decay": 0.1,
    },
    "cached_attention": lambda: {
        **{name: draw(2, 1, 2, 16) for name in ("q", "k", "v")},
        **{name: draw(2, 7, 2, 16) for name in ("keys", "values")},
        "lengths": SINGLE.ints([3, 7]),
        "arrivals": SINGLE.ints([[0, 0]] * 2),
    },
    "sample_embed": lambda: {
        "logits": draw(2, 20),
        "lengths": SINGLE.ints([3, 0]),
        "weight": draw(20, 8),
        "position_weight": draw(9, 8),
        "x": draw(2, 1, 8),
        "seen": SINGLE.ints([[0] * 20] * 2, "bool"),
        "repetition_penalty": draw(2).abs(),
    },
}


def test_every_public_op_is_compiled():
    named = {name for name in gpukernels.__all__ if callable(getattr(gpukernels, name))}
    assert named == {name.partition(",")[0] for name in (*PUBLIC, *WRITING)}


@without_a_warning
@pytest.mark.parametrize("name", WRITING)
def test_an_op_that_writes_is_compiled_whole(name):
    def use(arguments):
        return getattr(gpukernels, name)(**arguments), [each * 2 for each in arguments.values()]

    compiled = torch.compile(use, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    given = WRITING[name]()
    written, calls = [], []
    for run in (use, compiled):
        calls.append({key: each.clone() if hasattr(each, "clone") else each for key, each in given.items()})
        written.append(run(calls[-1]))
    torch.testing.assert_close(written[1], written[0], rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(calls[1], calls[0], rtol=RTOL, atol=ATOL)
    assert any(not torch.equal(calls[0][key], each) for key, each in given.items() if hasattr(each, "clone"))


@pytest.mark.parametrize("sizes", [None, True], ids=["sizes as they are", "any sizes"])
@pytest.mark.parametrize(
    ("name", "shapes", "option"),
    [
        ("attention", [(1, 5, 2, 16)] * 3, "scale"),
        ("layer_norm", [(4, 8), (8,)], "eps"),
        ("cross_entropy", [(4, 9)], "z_loss"),
    ],
)
def test_a_number_may_change_between_the_calls_of_a_graph(name, shapes, option, sizes):
    """A graph keeps open what it has seen two values of, and asks nothing of them that it could not trace."""

    def use(arrays, number):
        return getattr(gpukernels, name)(*arrays, **{option: number})

    arrays = [draw(*shape) for shape in shapes] + ([positions(4)] if name == "cross_entropy" else [])
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    torch._dynamo.reset()  # it counts the graphs of one function, whoever asked for them
    compiled = torch.compile(use, fullgraph=True, dynamic=sizes, backend=backend)
    for number in (0.5, 0.25, 0.125):
        torch.testing.assert_close(compiled(arrays, number), use(arrays, number), rtol=RTOL, atol=ATOL)


@without_a_warning
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_op_is_compiled_whole_and_without_a_warning(name):
    op, arrays, options = getattr(gpukernels, name.partition(",")[0]), PUBLIC[name](), OPTIONS.get(name, {})
    compiled = torch.compile(op, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(*arrays, **options), op(*arrays, **options), rtol=RTOL, atol=ATOL)
