"""A decode step of a GPT-2 as one persistent kernel: one program on each multiprocessor, one launch a token.

    for each layer:   QKV -> attention -> projection -> up -> down
    norm -> head -> sample

The stages are the code of the one-stage kernels (`few_rows`, `attention/decode`, `norm`, `sampling`), tile by tile,
with a barrier of all programs in front of each but the first (`barrier.py`). Between arriving at one and passing it
a program loads what its first tile needs of weights, norm parameters, or old keys and values (`stages.py`). The order
is a list that is checked when a step is made (`schedule.py`). A launch is cooperative: it is refused unless all
programs fit at once, which the barrier takes for granted.

Layers are addressed by one stride, from the first one's arrays: `why_not` says what else a model must be.

Measured on an H100, 2026-11-22, by probes: a naive persistent kernel, which loaded weights behind the barriers, took
350 microseconds a token of GPT-2 in float16; a barrier of 132 programs took 0.97; 63 kernels in a graph with
dependent launch took 185, of which a launch costs 1.2. This form has not run on a GPU yet. It compiles for one: no
spills, 255 registers, one program of 8 warps a multiprocessor, and the weights stand in front of the polls. Expected,
for batch 1: 62 barriers take 60 microseconds, a little less than 63 dependent launches, and weights come meanwhile as
they do there; the head reads 77 MB with one program on a multiprocessor instead of several. So it should end near the
graph, 150 to 200, on either side. It is used where a GPU has shown it equal and faster: see `model.persistent`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from gpukernels.kernels.attention.decode import head_tile, most_splits
from gpukernels.kernels.device import INTERPRETING, cdiv, gpu
from gpukernels.kernels.persistent.barrier import launch_target, wait
from gpukernels.kernels.persistent.schedule import GIVEN, check, decode_schedule
from gpukernels.kernels.persistent.stages import attention_stage, norm_stage, product_stage
from gpukernels.kernels.sampling import sample_row

#: The arrays of a block, in the order of the kernel's arguments.
BLOCK = tuple(
    f"{layer}.{kind}" for layer in ("norm1", "qkv", "projection", "norm2", "up", "down") for kind in ("weight", "bias")
)
#: The arguments of `gpukernels.sample` that a step can have, in the order of the kernel's.
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen", "seed", "stream", "step")
#: Rows at most: `few_rows` is made for so many.
MOST_ROWS = 64

_WARPS = 8
# Bytes of a row of a weight that 8 warps hold beside a row of x, and beside a norm's parameters too, with 255
# registers a thread. Chosen from the compile report, not yet measured: with GPT-2 medium's 8192 in `down` the kernel
# spills 40 bytes a thread on sm_90, with GPT-2's 6144 none.
_HELD, _HELD_WITH_NORM = 6144, 3328
_WIDEST_HEAD = 64  # GPT-2's; wider ones have not been compiled
_SAMPLED = 4096  # logits at a time: see `sampling.py`


@triton.jit(do_not_specialize=["M", "S", "splits"])
def _persistent_step_kernel(
    counter_ptr, arrivals_of_launch,
    x_ptr, hidden_ptr, qkv_ptr, attended_ptr, middle_ptr, up_ptr, normed_ptr, logits_ptr, token_ptr,
    norm1_weight_ptr, norm1_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, projection_weight_ptr, projection_bias_ptr,
    norm2_weight_ptr, norm2_bias_ptr, up_weight_ptr, up_bias_ptr, down_weight_ptr, down_bias_ptr,
    norm_weight_ptr, norm_bias_ptr, head_ptr, table_ptr, position_table_ptr,
    k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr, arrivals_ptr, scales_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, seen_ptr, seed_ptr, stream_ptr, step_ptr,
    M, S, splits, layers, stride_layer, stride_cache_layer, V, P, stride_seen_b, eps,
    C: tl.constexpr, F: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_QKV: tl.constexpr, BLOCK_PROJECTION: tl.constexpr, BLOCK_UP: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """M rows, one token each; the arrays of a layer lie `stride_layer` elements behind those of the one before.

    C, F and HEAD are the widths of the residual stream, of `up`, and of the logits, of which the first V may be chosen.
    """
    D: tl.constexpr = C // HEADS
    target = launch_target(counter_ptr, arrivals_of_launch)
    source_ptr = x_ptr
    for layer in range(layers):
        at = tl.full((), layer, tl.int64) * stride_layer
        cache_at = tl.full((), layer, tl.int64) * stride_cache_layer
        product_stage(
            counter_ptr, target, source_ptr, norm1_weight_ptr + at, norm1_bias_ptr + at,
            qkv_weight_ptr + at, qkv_bias_ptr + at, None, qkv_ptr, M, eps,
            3 * C, C, BLOCK_QKV, WARPS, PROGRAMS, None,
        )  # fmt: skip
        attention_stage(
            counter_ptr, target + PROGRAMS, qkv_ptr, k_ptr + cache_at, v_ptr + cache_at, lengths_ptr,
            acc_ptr, stats_ptr, arrivals_ptr, attended_ptr, scales_ptr + layer, M, S, splits,
            HEADS, D, SPLITS, BLOCK_N, BLOCK_D, BLOCK_P, PROGRAMS,
        )  # fmt: skip
        product_stage(
            counter_ptr, target + 2 * PROGRAMS, attended_ptr, None, None,
            projection_weight_ptr + at, projection_bias_ptr + at, source_ptr, middle_ptr, M, eps,
            C, C, BLOCK_PROJECTION, WARPS, PROGRAMS, None,
        )  # fmt: skip
        product_stage(
            counter_ptr, target + 3 * PROGRAMS, middle_ptr, norm2_weight_ptr + at, norm2_bias_ptr + at,
            up_weight_ptr + at, up_bias_ptr + at, None, up_ptr, M, eps,
            F, C, BLOCK_UP, WARPS, PROGRAMS, ACTIVATION,
        )  # fmt: skip
        product_stage(
            counter_ptr, target + 4 * PROGRAMS, up_ptr, None, None,
            down_weight_ptr + at, down_bias_ptr + at, middle_ptr, hidden_ptr, M, eps,
            C, F, BLOCK_PROJECTION, WARPS, PROGRAMS, None,
        )  # fmt: skip
        source_ptr = hidden_ptr
        target += 5 * PROGRAMS
    norm_stage(
        counter_ptr, target, source_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, M, eps, C, BLOCK_C, PROGRAMS
    )
    product_stage(
        counter_ptr, target + PROGRAMS, normed_ptr, None, None, head_ptr, None, None, logits_ptr, M, eps,
        HEAD, C, BLOCK_HEAD, WARPS, PROGRAMS, None,
    )  # fmt: skip
    wait(counter_ptr, target + 2 * PROGRAMS)
    for row in range(tl.program_id(0), M, PROGRAMS):
        sample_row(
            tl.full((), row, tl.int64), logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr,
            seen_ptr, None, seed_ptr, stream_ptr, step_ptr, token_ptr,
            lengths_ptr, table_ptr, position_table_ptr, x_ptr,
            V, HEAD, stride_seen_b, P, C, C, 1, C, 1, C, BLOCK_V, 512,
        )  # fmt: skip


def why_not(blocks: Sequence[Mapping[str, torch.Tensor]], *, heads: int) -> str | None:
    """Why a model of these blocks has no persistent step, or None if it has."""
    first = blocks[0]
    C, F, size = first["qkv.weight"].shape[1], first["up.weight"].shape[0], first["qkv.weight"].element_size()
    if _layer_stride(blocks) is None:
        return "the arrays of its layers do not lie at one distance from each other"
    if not INTERPRETING and size > 2:
        return "its products are of float32, which tensor cores do not multiply"
    for name, held, most in (("qkv", C, _HELD_WITH_NORM), ("down", F, _HELD)):
        if held * size > most:
            return f"a row of {name}'s weight has {held * size} bytes, and {most} fit the registers beside the rest"
    if C // heads > _WIDEST_HEAD:
        return f"its heads are {C // heads} wide, more than {_WIDEST_HEAD}"
    return None


def _layer_stride(blocks: Sequence[Mapping[str, torch.Tensor]]) -> int | None:
    """Elements from an array of one block to the same of the next: one number for all of them, or None."""

    def kind(x: torch.Tensor) -> tuple:
        return x.untyped_storage().data_ptr(), x.dtype, x.shape

    first, second = blocks[0], blocks[min(1, len(blocks) - 1)]
    stride = second["qkv.weight"].storage_offset() - first["qkv.weight"].storage_offset()
    for i, block in enumerate(blocks):
        for name in BLOCK:
            x, base = block[name], first[name]
            if (
                not x.is_contiguous()
                or kind(x) != kind(base)
                or x.storage_offset() - base.storage_offset() != i * stride
            ):
                return None
    return stride


def _programs() -> int:
    """How many programs a launch has; the interpreter runs one to its end before the next one."""
    return 1 if INTERPRETING else gpu().multiprocessors


class PersistentStep:
    """The step of one model and one cache. Nothing that it uses moves, so that it can be captured in a CUDA graph.

    Attributes:
        schedule: the checked stages.
        memory: by the schedule's names, the arrays that a step reads and writes.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, torch.Tensor]],
        *,
        norm: tuple[torch.Tensor, torch.Tensor],
        head: torch.Tensor,
        table: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        arrivals: torch.Tensor,
        x: torch.Tensor,
        scales: Sequence[float],
        eps: float,
        activation: str | None,
        vocabulary: int,
    ):
        """Allocates what lies between the stages, for as many rows as x has, 64 at most.

        Args:
            blocks: the arrays `BLOCK` of each layer; products are (out, in).
            norm, head: behind the last block: (C,) each, and (V, C), whose V may count rows of padding.
            table, positions: (V, C) and (P, C), of the next step's embedding.
            keys, values: (L, B, H, S, D), contiguous.
            lengths: (B,) int32, which already count the token that a step feeds.
            arrivals: (B, H) int32 zeros.
            x: (B, 1, C), the tokens that a step feeds, embedded; those of the next one afterwards.
            scales: what each layer's scores are multiplied by.
            vocabulary: ids from here on are never chosen.

        Raises:
            ValueError: a model that `why_not` refuses, or more rows.
        """
        heads = keys.shape[2]
        reason = why_not(blocks, heads=heads)
        if reason is not None:
            raise ValueError(f"a persistent step cannot be made of this model: {reason}")
        self._rows, _, C = x.shape
        if self._rows > MOST_ROWS:
            raise ValueError(f"a persistent step has {MOST_ROWS} rows at most, got {self._rows}")
        F, V = blocks[0]["up.weight"].shape[0], head.shape[0]
        with torch.cuda.device_of(x):
            self._programs = _programs()
            keys_of_block, most = head_tile(C // heads, x.element_size())[0], most_splits(heads)
        splits = max(1, min(most, cdiv(keys.shape[3], keys_of_block)))

        def empty(*shape: int, dtype: torch.dtype = x.dtype) -> torch.Tensor:
            return torch.empty((self._rows, *shape), dtype=dtype, device=x.device)

        partials = (empty(heads, splits, C // heads, dtype=torch.float32), empty(heads, splits, 2, dtype=torch.float32))
        widths = {"hidden": C, "qkv": 3 * C, "attended": C, "middle": C, "up": F, "normed": C, "logits": V}
        scratch = {name: empty(width) for name, width in widths.items()}
        self._tokens = empty(dtype=torch.int64)
        self._counter = torch.zeros(1, dtype=torch.int64, device=x.device)
        scales = torch.tensor([scale / math.log(2) for scale in scales], dtype=torch.float32, device=x.device)
        self.memory = {
            **{f"weights {i}": [block[name] for name in BLOCK] for i, block in enumerate(blocks)},
            **{f"keys {i}": [keys[i], values[i]] for i in range(len(blocks))},
            **{name: [array] for name, array in scratch.items()},
            "norm": list(norm), "head": [head], "table": [table, positions], "lengths": [lengths], "x": [x],
            "partials": [*partials, arrivals], "scales": [scales], "tokens": [self._tokens],
        }  # fmt: skip

        self._blocks = {
            "BLOCK_QKV": self._block(3 * C), "BLOCK_PROJECTION": self._block(C), "BLOCK_UP": self._block(F),
            "BLOCK_HEAD": self._block(V),
        }  # fmt: skip
        tiles = {
            "QKV": cdiv(3 * C, self._blocks["BLOCK_QKV"]), "attention": self._rows * heads * splits,
            "projection": cdiv(C, self._blocks["BLOCK_PROJECTION"]), "up": cdiv(F, self._blocks["BLOCK_UP"]),
            "down": cdiv(C, self._blocks["BLOCK_PROJECTION"]), "norm": self._rows,
            "head": cdiv(V, self._blocks["BLOCK_HEAD"]), "sample": self._rows,
        }  # fmt: skip
        self.schedule = decode_schedule(len(blocks), tiles)
        given = {name for stage in self.schedule for name, wanted in stage.reads.items() if wanted == GIVEN}
        check(
            self.schedule,
            given=given,
            results={
                **{f"key {i}": f"attention {i}" for i in range(len(blocks))},
                **dict.fromkeys(("x", "tokens", "lengths", "counters"), "sample"),
            },
        )
        barriers = sum(stage.barrier for stage in self.schedule)
        self._arrays = (
            self._counter, self._programs * barriers, x, *scratch.values(), self._tokens,
            *(blocks[0][name] for name in BLOCK), *norm, head, table, positions,
            keys, values, lengths, *partials, arrivals, scales,
        )  # fmt: skip
        self._sizes = (
            keys.shape[3], splits, len(blocks), _layer_stride(blocks), keys.stride(0), vocabulary, len(positions),
        )  # fmt: skip
        self._eps = eps
        self._constants = {
            "C": C, "F": F, "HEAD": V, "HEADS": heads, "ACTIVATION": activation, **self._blocks,
            "SPLITS": most, "BLOCK_N": keys_of_block, "BLOCK_D": max(16, triton.next_power_of_2(C // heads)),
            "BLOCK_P": triton.next_power_of_2(most), "BLOCK_C": max(16, triton.next_power_of_2(C)),
            "BLOCK_V": min(_SAMPLED, max(16, triton.next_power_of_2(vocabulary))),
            "WARPS": _WARPS, "PROGRAMS": self._programs,
        }  # fmt: skip

    def _block(self, N: int) -> int:
        """As `few_rows_tile` has it."""
        return 16 if 16 * self._programs <= N else 8

    def __call__(self, rows: int, options: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The next tokens (rows,) int64 of the first `rows` rows, -1 where the logits were not finite.

        Args:
            options: of `OPTIONS`, those that are used, for these rows.
        """
        seen = options.get("seen")
        seen = None if seen is None else seen.view(torch.uint8)
        options = [seen if name == "seen" else options.get(name) for name in OPTIONS]
        with torch.cuda.device_of(self._tokens):
            _persistent_step_kernel[(self._programs,)](
                *self._arrays, *options, rows, *self._sizes, 0 if seen is None else seen.stride(0), self._eps,
                **self._constants, num_warps=_WARPS, num_stages=2, launch_cooperative_grid=True,
            )  # fmt: skip
        return self._tokens[:rows]
