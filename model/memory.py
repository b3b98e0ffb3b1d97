"""How much memory a model takes, from its shape alone."""

import sys
from dataclasses import dataclass

from model import gpt2
from model.config import GPT2Config
from model.device import WIDTHS


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for; `kv_cache` and `logits` for one sequence of `context` tokens."""

    dtype: str
    context: int
    weights: int
    kv_cache: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.logits


def parameter_count(config: GPT2Config, *, head: bool | None = None) -> int:
    """How many numbers the model has; a tied output matrix counts once."""
    return sum(slot.size for slot in gpt2.slots(config, head=head))


def predict(config: GPT2Config, dtype: str, *, head: bool | None = None, context: int | None = None) -> Memory:
    """The memory of one sequence with weights, keys and values in `dtype`.

    The logits are float32, of the one position that decoding unembeds. On NumPy keys and values are
    float32 whatever the weights are.
    """
    context = config.n_positions if context is None else context
    return Memory(
        dtype=dtype,
        context=context,
        weights=parameter_count(config, head=head) * WIDTHS[dtype],
        kv_cache=2 * config.n_layer * context * config.n_embd * WIDTHS[dtype],
        logits=config.vocab_size * 4,
    )


def peak_memory() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(nbytes: int) -> str:
    """Bytes in decimal units, as files and memory makers count them: 497.8 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
