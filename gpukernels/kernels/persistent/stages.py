"""The stages of a persistent decode step: the code of the one-stage kernels, tile by tile, between two barriers.

Each loads what no stage of a step writes (weights, norm parameters, lengths, old keys and values), for its first
tile, then waits for the stage in front, does its tiles, and arrives for the next one. So between two barriers stands
what depends on the other programs, and no more; the weights come while a program waits for them.
"""

import triton
import triton.language as tl

from gpukernels.kernels.attention.decode import attend_split, find_split
from gpukernels.kernels.attention.shares import load_block
from gpukernels.kernels.few_rows import load_norm, load_weights, multiply_rows, weight_places
from gpukernels.kernels.norm import norm_rows
from gpukernels.kernels.persistent.barrier import arrive, wait


@triton.jit
def _tile_weights(
    weight_ptr, tile, there,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """All of a tile's rows of the weight (N, K), if `there`."""
    PIECES: tl.constexpr = (K + WARPS * 32 - 1) // (WARPS * 32)
    weight_ptr, k = weight_places(weight_ptr, tile, N, K, 1, BLOCK_N, WARPS)
    return load_weights(weight_ptr, k, there, 1, K, 0, PIECES, WARPS, BLOCK_N // 8, dtype)


@triton.jit
def _multiply_tile(
    x_ptr, bias_ptr, residual_ptr, y_ptr, weights, norm_weights, norm_biases, k, tile, M, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y (M, N)."""
    PIECES: tl.constexpr = (K + WARPS * 32 - 1) // (WARPS * 32)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)
    multiply_rows(
        x_ptr, residual_ptr, None, y_ptr, weights, norm_weights, norm_biases, bias,
        k, col, M, N, K, N, eps, K, WARPS, 0, PIECES, PIECES, True, ACTIVATION, True,
    )  # fmt: skip


@triton.jit
def product_stage(
    counter_ptr, target, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, M, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y (M, N) = activation(norm(x) @ weight.T + bias) + residual: see `few_rows`. All arrays are contiguous."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    weights = _tile_weights(weight_ptr, tile, tile < TILES, N, K, BLOCK_N, WARPS, dtype)
    k = 32 * tl.arange(0, WARPS)[None, :, None] + tl.arange(0, 32)[None, None, :]
    norm_weights = None
    norm_biases = None
    if norm_weight_ptr is not None:
        norm_weights = load_norm(norm_weight_ptr, k, K, WARPS)
        norm_biases = load_norm(norm_bias_ptr, k, K, WARPS)
    wait(counter_ptr, target)
    if TILES <= PROGRAMS:
        if tile < TILES:
            _multiply_tile(
                x_ptr, bias_ptr, residual_ptr, y_ptr, weights, norm_weights, norm_biases, k, tile, M, eps,
                N, K, BLOCK_N, WARPS, ACTIVATION,
            )  # fmt: skip
    else:
        for each in range(tile, TILES, PROGRAMS):
            # The next tile's weights come while this one is multiplied.
            following = _tile_weights(weight_ptr, each + PROGRAMS, each + PROGRAMS < TILES, N, K, BLOCK_N, WARPS, dtype)
            _multiply_tile(
                x_ptr, bias_ptr, residual_ptr, y_ptr, weights, norm_weights, norm_biases, k, each, M, eps,
                N, K, BLOCK_N, WARPS, ACTIVATION,
            )  # fmt: skip
            weights = following
    arrive(counter_ptr)


@triton.jit
def attention_stage(
    counter_ptr, target, qkv_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr, scale_ptr,
    M, S, splits,
    HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out (M, HEADS, D) of qkv (M, 3, HEADS, D), whose keys and values go to the cache (M, HEADS, S, D) too.

    A tile is one split of one head of one row: see `attention/decode.py`.
    """
    C: tl.constexpr = HEADS * D
    new_k_ptr = qkv_ptr + C
    new_v_ptr = qkv_ptr + 2 * C
    tile, tiles = tl.program_id(0), M * HEADS * splits
    scale = tl.load(scale_ptr)
    # Without a tile, the last one's place, and nothing is loaded or done there.
    place, split = tl.minimum(tile // splits, M * HEADS - 1), tile % splits
    first_k_ptr, first_v_ptr, length, used, start, old, takes_new = find_split(
        new_k_ptr, k_ptr, v_ptr, lengths_ptr, place, split, HEADS, S, None,
        HEADS * S * D, S * D, HEADS * S * D, S * D, SPLITS, 1, BLOCK_N,
    )  # fmt: skip
    loaded = tl.where(tile < tiles, old, start)
    k = load_block(first_k_ptr, start, loaded, D, D, BLOCK_N, BLOCK_D, False)
    v = load_block(first_v_ptr, start, loaded, D, D, BLOCK_N, BLOCK_D, False)
    wait(counter_ptr, target)
    if (tile < tiles) & (split < used):
        attend_split(
            qkv_ptr, new_k_ptr, new_v_ptr, first_k_ptr, first_v_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr, k, v,
            place, split, splits, length, used, start, old, takes_new, HEADS, scale,
            3 * C, D, 3 * C, D, 3 * C, D, D, D, 1, D, BLOCK_N, BLOCK_D, BLOCK_P,
        )  # fmt: skip
    for each in range(tile + PROGRAMS, tiles, PROGRAMS):
        place, split = each // splits, each % splits
        at_k_ptr, at_v_ptr, length, used, start, old, takes_new = find_split(
            new_k_ptr, k_ptr, v_ptr, lengths_ptr, place, split, HEADS, S, None,
            HEADS * S * D, S * D, HEADS * S * D, S * D, SPLITS, 1, BLOCK_N,
        )  # fmt: skip
        if split < used:
            attend_split(
                qkv_ptr, new_k_ptr, new_v_ptr, at_k_ptr, at_v_ptr, acc_ptr, stats_ptr, arrivals_ptr, out_ptr,
                None, None, place, split, splits, length, used, start, old, takes_new, HEADS, scale,
                3 * C, D, 3 * C, D, 3 * C, D, D, D, 1, D, BLOCK_N, BLOCK_D, BLOCK_P,
            )  # fmt: skip
    arrive(counter_ptr)


@triton.jit
def norm_stage(
    counter_ptr, target, x_ptr, weight_ptr, bias_ptr, y_ptr, M, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y = norm(x), (M, C), a row for each tile."""
    wait(counter_ptr, target)
    for row in range(tl.program_id(0), M, PROGRAMS):
        norm_rows(
            x_ptr, None, weight_ptr, bias_ptr, y_ptr, None, None, None, row, M, C, C, 0, eps,
            1, BLOCK_C, 1, C // BLOCK_C, True, False,
        )  # fmt: skip
    arrive(counter_ptr)
