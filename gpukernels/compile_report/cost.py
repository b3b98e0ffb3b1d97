"""What a launch costs, from its arguments: bytes that must move, and operations.

Bytes are the compulsory traffic: each distinct element that the kernel needs, read once and written once. What
is read again comes from a cache, at best. Values are not known where nothing runs, so that rows of a cache count
as full, and of a table of embeddings as many rows are read as there are indices (or rows). Operations count a
multiply-add as two, whatever is left out of account by a mask not at all, and what is done to one element
beside products (a norm, an activation, a softmax) by a round number.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from gpukernels.compile_report.recording import Launch

Arguments = Mapping[str, Any]


class Cost(NamedTuple):
    """Of one launch."""

    read: int  # bytes
    written: int  # bytes
    flops: int
    tensor_cores: bool  # its products are of 16-bit elements, which tensor cores multiply

    @property
    def moved(self) -> int:
        return self.read + self.written


class _Kernel(NamedTuple):
    """A kernel's arrays, by the names of its arguments, and its operations."""

    reads: str
    writes: str
    flops: Callable[[Arguments], int]
    dot: str = ""  # the two operands of its products
    part_read: Mapping[str, Callable[[Arguments], int]] = {}  # elements of what is not read whole
    part_written: Mapping[str, Callable[[Arguments], int]] = {}


def cost(launch: Launch) -> Cost:
    """The cost of a launch that `record` has written down.

    Raises:
        KeyError: a kernel that this module does not know.
    """
    return cost_of(launch.kernel, launch.arguments)


def cost_of(kernel: str, arguments: Arguments) -> Cost:
    """As `cost`, by the kernel's name and its arguments by name."""
    if kernel not in KERNELS:
        raise KeyError(f"cost: nothing is known of the kernel {kernel}")
    entry = KERNELS[kernel]

    def moved(names: str, partly: Mapping[str, Callable[[Arguments], int]]) -> int:
        total = 0
        for name in names.split():
            array = _array(arguments[name])
            if array is not None:
                total += array.element_size() * (partly[name](arguments) if name in partly else _elements(array))
        return total

    operands = [_array(arguments[name]) for name in entry.dot.split()]
    cores = bool(operands) and all(each.element_size() == 2 for each in operands)
    return Cost(
        read=moved(entry.reads, entry.part_read),
        written=moved(entry.writes, entry.part_written),
        flops=entry.flops(arguments),
        tensor_cores=cores,
    )


def _array(value: Any) -> torch.Tensor | None:
    """The tensor of an argument: itself, or what a descriptor is of."""
    value = getattr(value, "base", value)
    return value if isinstance(value, torch.Tensor) else None


def _elements(array: torch.Tensor) -> int:
    """Distinct ones: what is expanded is one."""
    return math.prod(size for size, stride in zip(array.shape, array.stride(), strict=True) if stride)


def _each(name: str, count: int) -> Callable[[Arguments], int]:
    """`count` operations for each element of an array."""
    return lambda a: count * _elements(_array(a[name]))


# Attention


def _pairs(a: Arguments) -> int:
    """Queries and keys that meet: the queries are the tail of the keys."""
    T, S, window = a["T"], a["S"], a["WINDOW"]
    if not a["CAUSAL"]:
        return T * S
    # The query at position p sees min(p + 1, window) keys; T positions up to S - 1, those below 0 none.
    first = max(S - T, 0)
    seen = min(window, S) if window else S
    growing = range(first + 1, min(S, seen) + 1)
    return sum(growing) + (S - first - len(growing)) * seen


def _attention(products: int) -> Callable[[Arguments], int]:
    """`products` of the size of the scores, and the softmax."""

    def flops(a: Arguments) -> int:
        rows = _array(a["q"]).shape[0] * a["H"]
        return rows * _pairs(a) * (2 * products * a["D"] + 4)

    return flops


def _seen_keys(a: Arguments) -> int:
    """Elements of k, or v, that some query sees."""
    B, S, heads, D = _array(a["k"]).shape
    if a["CAUSAL"] and a["WINDOW"]:
        S = min(S, a["T"] + a["WINDOW"] - 1)
    return B * S * heads * D


_SEEN = {"k": _seen_keys, "v": _seen_keys}


def _cached(a: Arguments) -> int:
    """Elements of a cache's keys that a step reads: all but the new ones, which it writes."""
    B, S, heads, D = _array(a["k_ptr"]).shape
    keys = S if a["window"] is None else min(S, a["window"])
    return B * heads * D * (keys - (a["new_k_ptr"] is not None))


def _fresh(a: Arguments) -> int:
    return 0 if a["new_k_ptr"] is None else _elements(_array(a["new_k_ptr"]))


def _decode_flops(a: Arguments) -> int:
    B, H, D = _array(a["q_ptr"]).shape
    S = _array(a["k_ptr"]).shape[1]
    return B * H * (S if a["window"] is None else min(S, a["window"])) * (4 * D + 4)


def _partials(name: str) -> Callable[[Arguments], int]:
    """Where one program has all keys of a head, it leaves no partial."""
    return lambda a: _elements(_array(a[name])) * (_array(a["stats_ptr"]).shape[2] > 1)


_PARTIALS = {name: _partials(name) for name in ("acc_ptr", "stats_ptr")}

_DECODE = _Kernel(
    "q_ptr new_k_ptr new_v_ptr k_ptr v_ptr lengths_ptr acc_ptr stats_ptr",
    "new_k_ptr new_v_ptr acc_ptr stats_ptr out_ptr",
    _decode_flops,
    part_read={"k_ptr": _cached, "v_ptr": _cached, **_PARTIALS},
    part_written=_PARTIALS,
)


# Products, and what has rows of a table


def _product(a_name: str) -> Callable[[Arguments], int]:
    return lambda a: 2 * _elements(_array(a[a_name])) * a["N"]


def _few_rows(a: Arguments) -> int:
    x = _array(a["x_ptr"])
    return 2 * x.shape[0] * x.shape[1] * a["N"] + (8 * _elements(x) if a["norm_weight_ptr"] is not None else 0)


def _rows_of(table: str, index: str) -> Callable[[Arguments], int]:
    """As many rows of a table as there are indices, if it has so many."""

    def elements(a: Arguments) -> int:
        rows, width = _array(a[table]).shape
        return min(rows, _elements(_array(a[index]))) * width

    return elements


def _rows_in_use(a: Arguments) -> int:
    return 0 if a["lengths_ptr"] is None else _elements(_array(a["lengths_ptr"]))


def _unless(name: str, other: str) -> Callable[[Arguments], int]:
    """An array that is needed only where there is no other."""
    return lambda a: _elements(_array(a[name])) if a[other] is None else 0


def _part(a: Arguments) -> int:
    """Elements of one product's place in the result."""
    out = _array(a["out_ptr"])
    return out.shape[-2] * out.shape[-1]


def _second_sum(a: Arguments) -> int:
    """Elements of a second result; where there is none, the first stands for it."""
    return a["N"] * (_array(a["partial_ptr"]).shape[0] - 1)


def _partial_sums(a: Arguments) -> int:
    return a["P"] * a["N"] * _array(a["partial_ptr"]).shape[0]


# What a block of a persistent step has: the arguments are the first layer's.
_BLOCK = " ".join(
    f"{layer}_{kind}_ptr"
    for layer in ("norm1", "qkv", "projection", "norm2", "up", "down")
    for kind in ("weight", "bias")
)


def _every_layer(name: str) -> Callable[[Arguments], int]:
    return lambda a: a["layers"] * _elements(_array(a[name]))


def _step(a: Arguments) -> int:
    """The products, and attention as far as the cache goes."""
    C, layers = a["C"], a["layers"]
    weights = layers * C * (4 * C + 2 * a["F"]) + a["HEAD"] * C
    return a["M"] * (2 * weights + layers * a["S"] * (4 * C + 4 * a["HEADS"]))


def _rope(a: Arguments) -> int:
    return 6 * _elements(_array(a["x_ptr"]))


_NORM = _Kernel("x_ptr residual_ptr weight_ptr bias_ptr", "y_ptr total_ptr mean_ptr rstd_ptr", _each("x_ptr", 8))

KERNELS: dict[str, _Kernel] = {
    "_activation_backward_kernel": _Kernel("dy_ptr z_ptr", "dz_ptr partial_ptr", _each("dy_ptr", 12)),
    "_adamw_kernel": _Kernel(
        "parameter_ptr gradient_ptr first_ptr second_ptr master_ptr step_ptr rate_ptr scale_ptr",
        "parameter_ptr first_ptr second_ptr master_ptr",
        _each("gradient_ptr", 15),
        part_read={"parameter_ptr": _unless("parameter_ptr", "master_ptr")},
    ),
    "_add_partials_kernel": _Kernel(
        "partial_ptr out0_ptr out1_ptr",
        "out0_ptr out1_ptr",
        _partial_sums,
        part_read={
            "partial_ptr": _partial_sums,
            "out0_ptr": lambda a: a["ACCUMULATE"] * a["N"],
            "out1_ptr": lambda a: a["ACCUMULATE"] * _second_sum(a),
        },
        part_written={"out1_ptr": _second_sum},
    ),
    "_append_kernel": _Kernel("new_k_ptr new_v_ptr lengths_ptr", "new_k_ptr new_v_ptr", lambda a: 0),
    "_attention_backward_keys_kernel": _Kernel(
        "q k v dout lse_ptr delta_ptr lengths_ptr bounds_ptr", "dk_ptr dv_ptr", _attention(4), "q k"
    ),
    "_attention_backward_queries_kernel": _Kernel(
        "q k v dout lse_ptr delta_ptr lengths_ptr bounds_ptr", "dq_ptr", _attention(3), "q k", _SEEN
    ),
    "_attention_delta_kernel": _Kernel("out_ptr dout_ptr dlse_ptr", "delta_ptr", _each("out_ptr", 2)),
    "_attention_forward_kernel": _Kernel(
        "q k v lengths_ptr bounds_ptr", "out_ptr lse_ptr", _attention(2), "q k", _SEEN
    ),
    "_cross_entropy_backward_kernel": _Kernel(
        "dloss_ptr x_ptr targets_ptr weights_ptr divisor_ptr lse_ptr", "dx_ptr", _each("x_ptr", 4)
    ),
    "_cross_entropy_kernel": _Kernel(
        "x_ptr targets_ptr weights_ptr divisor_ptr dloss_ptr", "loss_ptr lse_ptr dx_ptr", _each("x_ptr", 8)
    ),
    "_decode_group_kernel": _DECODE._replace(dot="q_ptr k_ptr"),
    "_decode_head_kernel": _DECODE,
    "_divisor_kernel": _Kernel("targets_ptr weights_ptr", "divisor_ptr", _each("targets_ptr", 2)),
    "_document_bounds_kernel": _Kernel("documents_ptr", "bounds_ptr", _each("documents_ptr", 8)),
    "_embedding_backward_kernel": _Kernel("dy_ptr order_ptr firsts_ptr", "dtable_ptr", _each("dy_ptr", 1)),
    "_embedding_forward_kernel": _Kernel(
        "ids_ptr weight_ptr positions_ptr position_weight_ptr",
        "y_ptr",
        _each("y_ptr", 1),
        part_read={
            "weight_ptr": _rows_of("weight_ptr", "ids_ptr"),
            "position_weight_ptr": _rows_of("position_weight_ptr", "positions_ptr"),
        },
    ),
    "_few_rows_kernel": _Kernel(
        "x_ptr norm_weight_ptr norm_bias_ptr weight_ptr bias_ptr residual_ptr partial_ptr",
        "y_ptr partial_ptr",
        _few_rows,
        "x_ptr weight_ptr",
    ),
    "_gelu_backward_kernel": _Kernel("dy_ptr x_ptr", "dx_ptr", _each("x_ptr", 12)),
    "_gelu_forward_kernel": _Kernel("x_ptr", "y_ptr", _each("x_ptr", 8)),
    "_norm_backward_kernel": _Kernel(
        "dy_ptr dtotal_ptr s_ptr weight_ptr mean_ptr rstd_ptr means_ptr", "ds_ptr partial_ptr", _each("s_ptr", 12)
    ),
    "_norm_backward_means_kernel": _Kernel("dy_ptr s_ptr weight_ptr mean_ptr rstd_ptr", "means_ptr", _each("s_ptr", 6)),
    "_norm_forward_kernel": _NORM,
    "_norm_forward_wide_kernel": _NORM,
    "_persistent_step_kernel": _Kernel(
        f"{_BLOCK} norm_weight_ptr norm_bias_ptr head_ptr k_ptr v_ptr lengths_ptr",
        "token_ptr lengths_ptr x_ptr",
        _step,
        "x_ptr qkv_weight_ptr",
        part_read={name: _every_layer(name) for name in _BLOCK.split()},
    ),
    "_product_descriptor_kernel": _Kernel(
        "a_desc b_desc bias_ptr residual_desc", "z_desc out_desc", _product("a_desc"), "a_desc b_desc"
    ),
    "_product_kernel": _Kernel(
        "a_ptr b_ptr bias_ptr residual_ptr",
        "z_ptr out_ptr",
        _product("a_ptr"),
        "a_ptr b_ptr",
        # Behind the rows of an operand that is read along them, up to 15 elements are read too.
        part_read={
            "a_ptr": lambda a: _elements(_array(a["a_ptr"])) // a["M"] * a["read_m"],
            "b_ptr": lambda a: _elements(_array(a["b_ptr"])) // a["N"] * a["read_n"],
        },
        # The parts of a split sum stand apart by whole tiles.
        part_written={"out_ptr": lambda a: a["M"] * a["N"] * (_elements(_array(a["out_ptr"])) // _part(a))},
    ),
    "_rope_kernel": _Kernel("x_ptr positions_ptr frequencies_ptr", "y_ptr", _rope),
    "_sample_kernel": _Kernel(
        "x_ptr temperature_ptr top_k_ptr top_p_ptr min_p_ptr penalty_ptr seen_ptr uniform_ptr seed_ptr stream_ptr "
        "step_ptr lengths_ptr weight_ptr position_weight_ptr",
        "token_ptr lengths_ptr step_ptr seen_ptr embedded_ptr",
        _each("x_ptr", 2),
        part_read={
            "weight_ptr": _rows_of("weight_ptr", "token_ptr"),
            "position_weight_ptr": _rows_of("position_weight_ptr", "token_ptr"),
        },
        # One step further, and one token more, where the token is embedded.
        part_written=dict.fromkeys(("step_ptr", "seen_ptr"), _rows_in_use),
    ),
    "_scale_kernel": _Kernel("x_ptr dloss_ptr divisor_ptr", "out_ptr", _each("x_ptr", 1)),
    "_swiglu_backward_kernel": _Kernel("dy_ptr gate_ptr up_ptr", "dgate_ptr dup_ptr", _each("gate_ptr", 10)),
    "_swiglu_forward_kernel": _Kernel("gate_ptr up_ptr", "y_ptr", _each("gate_ptr", 6)),
    "_total_kernel": _Kernel("loss_ptr divisor_ptr", "total_ptr", _each("loss_ptr", 1)),
}
