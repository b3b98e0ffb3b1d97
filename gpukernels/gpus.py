"""The roofs of GPUs: how fast memory is read and products are made, and what that says of a launch."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # costs are of torch tensors, and the table of GPUs is for everybody
    from gpukernels.compile_report.cost import Cost


class Gpu(NamedTuple):
    """A model of GPU, by its data sheet: bytes and operations a second, dense, without a sparsity factor."""

    name: str
    capability: int  # 90 for sm_90
    memory: int  # bytes
    bandwidth: float
    tensor_flops: float  # float16 and bfloat16, accumulated in float32
    flops: float  # float32, a multiply-add being two
    source: str
    measured_bandwidth: float | None = None  # of a large device copy, read and written bytes counted
    measured_tensor_flops: float | None = None  # of a float16 product of 8192 cubed


_GB = 10**9

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 80 * _GB, 2.039e12, 312e12, 19.5e12, "NVIDIA A100 80GB SXM data sheet, 2021"),
        # Ada has half the rate where it accumulates in float32.
        Gpu("RTX 4090", 89, 24 * _GB, 1.008e12, 165.2e12, 82.6e12, "NVIDIA Ada GPU architecture white paper, 2022"),
        Gpu(
            "H100", 90, 80 * _GB, 3.35e12, 989.4e12, 66.9e12, "NVIDIA H100 SXM5 architecture white paper, 2022",
            measured_bandwidth=3.02e12, measured_tensor_flops=678e12,
        ),
        Gpu("H200", 90, 141 * _GB, 4.8e12, 989.4e12, 66.9e12, "NVIDIA H200 SXM data sheet, 2023"),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """A GPU by a key of `GPUS`, in letters of either case.

    Raises:
        ValueError: another name.
    """
    for key, gpu in GPUS.items():
        if key.lower() == name.lower():
            return gpu
    raise ValueError(f"the GPU must be one of {', '.join(GPUS)}, got {name!r}")


def roofline(cost: "Cost", gpu: Gpu) -> float:
    """The least time of a launch on a GPU, in seconds: that of its bytes or of its operations, which is more.

    By the data sheet, so that no kernel is faster; launching itself takes 2 to 5 microseconds more. Williams,
    Waterman and Patterson, "Roofline: An Insightful Visual Performance Model", 2009.
    """
    rate = gpu.tensor_flops if cost.tensor_cores else gpu.flops
    return max(cost.moved / gpu.bandwidth, cost.flops / rate)
