"""New keys and values to their places in a cache, for several positions a row.

    k[b, lengths[b] - T + i] = new_k[b, i]          the same for v; a place outside the cache is not written

Cost: 4 B T Hkv D b bytes for elements of b bytes. A decode step needs no such launch: `decode.py` does it.
"""

import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv


# One binary for whichever row `lengths` begins at.
@triton.jit(do_not_specialize_on_alignment=["lengths_ptr"])
def _append_kernel(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, lengths_ptr,
    T, S, D, stride_new_kb, stride_new_kt, stride_new_kh, stride_new_vb, stride_new_vt, stride_new_vh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T positions of one head."""
    blocks = tl.cdiv(T, BLOCK_T)
    row, head = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(lengths_ptr + row).to(tl.int32) - T + t
    d = tl.arange(0, BLOCK_D)
    mask = ((t < T) & (place >= 0) & (place < S))[:, None] & (d < D)[None, :]
    t, place = t[:, None].to(tl.int64), place[:, None].to(tl.int64)
    new_k = tl.load(new_k_ptr + row * stride_new_kb + head * stride_new_kh + t * stride_new_kt + d[None, :], mask)
    new_v = tl.load(new_v_ptr + row * stride_new_vb + head * stride_new_vh + t * stride_new_vt + d[None, :], mask)
    tl.store(k_ptr + row * stride_kb + head * stride_kh + place * stride_ks + d[None, :], new_k, mask)
    tl.store(v_ptr + row * stride_vb + head * stride_vh + place * stride_vs + d[None, :], new_v, mask)


def append(new_k, new_v, k, v, lengths):
    """Writes new_k, new_v (B, T, Hkv, D) into k, v (B, S, Hkv, D), whose inner stride is 1."""
    B, T, heads, D = new_k.shape
    if not new_k.numel():
        return
    new_k, new_v = (each if each.stride(-1) == 1 else each.contiguous() for each in (new_k, new_v))
    BLOCK_D = triton.next_power_of_2(D)
    # 16 elements a thread. Chosen from the compile report, not yet measured.
    BLOCK_T = min(max(1, 2048 // BLOCK_D), triton.next_power_of_2(T))
    _append_kernel[(B * cdiv(T, BLOCK_T), heads)](
        new_k, new_v, k, v, lengths.contiguous(),
        T, k.shape[1], D, *new_k.stride()[:3], *new_v.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
    )  # fmt: skip
