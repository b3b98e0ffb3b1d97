"""How much memory a model takes, from its shape alone: what is allocated, line by line.

    ledger = predict(PRESETS["gpt2"], "float16", "cuda", batch=8)

`model.footprint` measures the same, and `model.room` says what is free.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gpukernels.cast import WIDENED
from gpukernels.threads import blas_threads, threads
from model.architecture import architecture
from model.config import Config
from model.decoder import CHUNK
from model.device import WIDTHS, Device, NumpyDevice, sees_gpu
from model.graph import captured_capacity, is_capturable, prompt_sizes
from model.llama_config import LlamaConfig
from model.parameters import padded_rows, padded_sizes

#: Whose memory: NumPy's, that of plain torch on the CPU, or a GPU's.
Place = Literal["numpy", "torch", "cuda"]

_MIB = 2**20

# A product packs blocks of both matrices: OpenBLAS's for float32 on AVX-512 are 448 wide and high, and a sum of
# up to two of them is split in halves. Measured with OpenBLAS 0.3.30, 1 and 2 threads, 2026-11-27: within 0.1 MB.
_BLAS_BLOCK = 448
_BLOCK = 65536  # elements of an activation at a time, and as many beside them: gpukernels/numpy_ops
_QUERIES, _SCORES = 128, 65536  # of attention at a time; the scores at least, where there are so many
_CODE = 10**6  # pages of NumPy's and BLAS's code that the first use brings in, about (measured, same date)

# Plain torch on the CPU: code and buffers, about; and of a feed-forward's numbers beside what a block has alive, what
# MKL packs and the allocator does not give back. Measured with torch 2.13, 2026-11-28, up to GPT-2 124M: peaks are a
# tenth above this at most, a fifth below.
_CODE_OF_TORCH, _FED_OF_TORCH = 22 * 10**6, 4.5
# SwiGLU of narrow numbers is computed in float32, which is so many more.
_GATED_OF_TORCH = 5

# Decode attention's partial results of one row, of all heads together: about one for each multiprocessor of an
# H100; see gpukernels/kernels/attention/decode.py.
_PARTIALS = 132

# torch's caching allocator asks CUDA for multiples of 2 MiB, for 20 MiB where a tensor has 1 to 10, and for
# 2 MiB where it has less (c10/cuda/CUDACachingAllocator).
_SEGMENT, _LARGE_POOL = 2 * _MIB, 20 * _MIB
#: Buffers while weights are loaded: on a GPU what `gpukernels.cast.upload` stages, more than the host's own.
LOADING = 16 * _MIB

#: What counting what fits sets aside on a GPU for CUDA's context and the code of kernels: an allowance, as it
#: depends on GPU and driver. `model.footprint` measures it.
CONTEXT_ALLOWANCE = 10**9


@dataclass(frozen=True)
class Ledger:
    """Bytes by what they are for, while `batch` sequences of `context` tokens are computed.

    Attributes:
        dtype: of the weights.
        weights: with the padded rows of token tables, and each parameter's alignment.
        kv_cache: keys and values. Captured decoding on CUDA has room for more than the context
            (`model.graph.captured_capacity`); NumPy keeps float32.
        activations: what stands between the ops where it is most, in the prefill of one row; captured, with what
            prompts are filled up with.
        logits: of the position of each row that is unembedded; captured, also one row for each length that prompts
            of `context` tokens or less are filled up to.
        workspace: what the ops keep beside that: on the CPU attention's scores, with NumPy also BLAS's packed blocks
            and widened weights; on CUDA the partial results of decode attention.
        slack: what torch's allocator holds on to beyond what it was asked for; a guess from its rules.
    """

    place: Place
    dtype: str
    batch: int
    context: int
    weights: int
    kv_cache: int
    activations: int
    logits: int
    workspace: int
    slack: int

    @property
    def beside_weights(self) -> int:
        """What generation takes beside the loaded model."""
        return self.kv_cache + self.activations + self.logits + self.workspace + self.slack

    @property
    def needs(self) -> dict[str, int]:
        """What generation must be able to have beside the loaded model, by what it is for; slack is no need."""
        return {
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "logits": self.logits,
            "workspace": self.workspace,
        }

    @property
    def peak(self) -> int:
        """The most at any time; on CUDA without its context, which is there before the first byte."""
        return self.weights + self.beside_weights


def likely_place() -> Place:
    """Where "auto" would put a model, without asking torch."""
    return "cuda" if sees_gpu() else "numpy"


def place_of(device: Device) -> Place:
    if isinstance(device, NumpyDevice):
        return "numpy"
    return "cuda" if device.name.startswith("cuda") else "torch"


def parameter_count(config: Config, *, head: bool | None = None) -> int:
    """How many numbers the model has; a tied output matrix counts once."""
    return sum(slot.size for slot in architecture(config).slots(config, head=head))


def weight_bytes(config: Config, dtype: str, *, head: bool | None = None) -> int:
    """The bytes of the parameters' one allocation."""
    return sum(padded_sizes(architecture(config).slots(config, head=head))) * WIDTHS[dtype]


def predict(
    config: Config,
    dtype: str,
    place: Place,
    *,
    head: bool | None = None,
    batch: int = 1,
    context: int | None = None,
    positions: int | None = None,
) -> Ledger:
    """The memory of a model with weights in `dtype`, and of `batch` sequences of `context` tokens.

    Args:
        head: whether it has an output matrix of its own; default as the config says.
        context: tokens of a row, prompt and answer; default all positions.
        positions: how many the runtime uses at most; default all that the model has.
    """
    positions = config.n_positions if positions is None else positions
    context = positions if context is None else context
    width = 4 if place == "numpy" else WIDTHS[dtype]  # of what is computed
    captured = place == "cuda" and is_capturable(config)
    room = captured_capacity(context, positions) if captured else context
    sizes = prompt_sizes(context, room) if captured else []
    tokens = max([min(context, CHUNK), *sizes])
    ledger = {
        "weights": weight_bytes(config, dtype, head=head),
        "kv_cache": 2 * config.n_layer * batch * room * config.kv_heads * config.head_width * width,
        "activations": max(tokens, batch) * architecture(config).live(config) * width,
        "logits": (batch + len(sizes)) * padded_rows(config.vocab_size) * width,
    }
    workspace = slack = 0
    if place == "cuda":
        tensors = (ledger["weights"], ledger["kv_cache"] // 2, ledger["kv_cache"] // 2)
        workspace = batch * _PARTIALS * (config.head_width + 2) * 4
        slack = sum(-size % _SEGMENT for size in tensors) + _LARGE_POOL + _SEGMENT + LOADING  # which it keeps
    elif place == "torch":
        workspace = _torch_workspace(config, dtype, max(tokens, batch), tokens, context)
    else:
        workspace = _numpy_workspace(config, tokens, context, narrow=dtype != "float32")
    return Ledger(place, dtype, batch, context, **ledger, workspace=workspace, slack=slack)


def _torch_workspace(config: Config, dtype: str, tokens: int, queries: int, keys: int) -> int:
    """Of `tokens`; attention has `queries` of one row over `keys` at a time: a mask, as bytes and as float32, where
    there is more to hide than the keys that follow; and narrow numbers in float32."""
    width = WIDTHS[dtype]
    gated = isinstance(config, LlamaConfig) and width < 4
    feed_forward = tokens * config.feed_forward_width * (_FED_OF_TORCH * width + 4 * _GATED_OF_TORCH * gated)
    window = getattr(config, "sliding_window", None) or keys
    attention = 5 * queries * keys if min(queries, window) < keys else 0
    if width < 4:
        attention += 4 * config.head_width * 2 * (keys * config.kv_heads + queries * config.n_head)
    return _CODE_OF_TORCH + int(max(feed_forward, attention))


def _numpy_workspace(config: Config, tokens: int, context: int, *, narrow: bool) -> int:
    """Of `tokens` rows of a prefill over `context` keys; `narrow` weights are widened as they are used."""
    width, hidden = config.n_embd, config.feed_forward_width
    depth = hidden if hidden <= _BLAS_BLOCK else min(hidden // 2, _BLAS_BLOCK)
    blas = (tokens + blas_threads() * min(hidden, _BLAS_BLOCK)) * depth
    queries = min(tokens, _QUERIES)
    scores = config.n_head * queries * context
    scores = min(max(_SCORES, scores // config.kv_heads), scores)  # of a key-value head's queries, or more
    elements = blas + scores + 2 * min(_BLOCK, tokens * hidden)
    if narrow:  # a block as it is stored (half as wide), widened, and its product
        block = min(WIDENED, width * hidden)
        elements += max(block * 3 // 2 + tokens * min(hidden, WIDENED // width), threads() * block)
    return _CODE + 4 * elements


def logits_needs(config: Config, dtype: str, place: Place, rows: int, new: int) -> dict[str, int]:
    """What `LanguageModel.logits` takes, which computes all of its (B, T) tokens at once."""
    tokens = rows * new
    width = 4 if place == "numpy" else WIDTHS[dtype]
    # What they are copied to on the way out: CUDA's without padding, torch's as float32.
    copied = {"numpy": 0, "torch": 4 if width < 4 else 0, "cuda": width}[place]
    needs = {
        "activations": tokens * architecture(config).live(config) * width,
        "logits": tokens * padded_rows(config.vocab_size) * (width + copied),
    }
    if place == "numpy":
        needs["workspace"] = _numpy_workspace(config, tokens, new, narrow=dtype != "float32")
    elif place == "torch":
        needs["workspace"] = _torch_workspace(config, dtype, tokens, new, new)
    return needs


def most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to `limit` that fits, where every smaller one does too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


_MOST_ROWS = 2**20


def largest(ledger: Ledger, config: Config, nbytes: int, *, head: bool | None = None) -> tuple[int, int]:
    """What fits into so many bytes: the largest batch at the ledger's context, the longest context at its batch.

    0 where not even one does. A context ends where the model's positions do.
    """

    def fits(batch: int, context: int) -> bool:
        return predict(config, ledger.dtype, ledger.place, head=head, batch=batch, context=context).peak <= nbytes

    batch = most(lambda batch: fits(batch, ledger.context), _MOST_ROWS)
    return batch, most(lambda context: fits(ledger.batch, context), config.n_positions)


def peak_memory() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(nbytes: int) -> str:
    """Bytes in decimal units, as files and memory makers count them: 497.8 MB, 6.23 GB."""
    value, unit, digits = float(nbytes), "B", 0
    for larger, fine in (("kB", 1), ("MB", 1), ("GB", 2), ("TB", 2)):
        if value < 1000:
            break
        value, unit, digits = value / 1000, larger, fine
    return f"{value:.{digits}f} {unit}"
