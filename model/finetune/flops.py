"""How much a training step computes, and how much a GPU could."""

from gpukernels.gpus import GPUS
from model.config import Config
from model.memory import parameter_count

# What torch calls a GPU -> its data sheet in `gpukernels.gpus`. The PCIe and NVL forms of an H100 have
# other peaks, so a name must be whole.
_NAMES = {
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}


def flops_per_token(config: Config, context: int) -> float:
    """Operations of forward and backward for one token in a window of `context`: 6 N + 6 L C T.

    A multiply-add is two. N is every parameter, of the token table and the output matrix one, as a table is looked up
    and not multiplied; attention's two products see half a window on average, and three passes make 6. As in llm.c;
    recomputation does not count, nor that a sliding window sees less.
    """
    attention = config.n_layer * config.n_head * config.head_width * context
    return 6.0 * (parameter_count(config, head=False) + attention)


def peak_flops(name: str, dtype: str) -> float | None:
    """Dense operations a second of a GPU by the name that torch gives it; None where it is not known.

    float16 and bfloat16 by tensor cores; float32 without, as the kernels compute it.
    """
    if name not in _NAMES:
        return None
    gpu = GPUS[_NAMES[name]]
    return gpu.flops if dtype == "float32" else gpu.tensor_flops
