"""What a decode step must move, and the least time that this takes: from a config alone, before anything runs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from model.architecture import architecture
from model.config import PRESETS, Config
from model.device import WIDTHS
from model.memory import human


class Step(NamedTuple):
    """The bytes of one step, which gives each row of a batch a token."""

    weights: int  # each read once, whatever the batch is
    cache: int  # keys and values of all rows
    rows: int

    @property
    def moved(self) -> int:
        return self.weights + self.cache

    def floor(self, bandwidth: float) -> float:
        """The least seconds, at so many bytes a second."""
        return self.moved / bandwidth

    def limit(self, bandwidth: float) -> float:
        """The most tokens a second."""
        return self.rows / self.floor(bandwidth)


def step(config: Config, dtype: str, *, batch: int, context: int) -> Step:
    """A step whose rows have `context` tokens in the cache. Of a table that is looked up, a row is nothing."""
    looked_up = {"positions.weight"} if config.tie_word_embeddings else {"positions.weight", "tokens.weight"}
    slots = architecture(config).slots(config)
    weights = sum(slot.size for slot in slots if slot.name not in looked_up)
    seen = min(context, getattr(config, "sliding_window", None) or context)
    cache = 2 * config.n_layer * batch * seen * config.kv_heads * config.head_width
    return Step(weights * WIDTHS[dtype], cache * WIDTHS[dtype], batch)


def card(
    presets: Iterable[str],
    dtype: str,
    cases: Sequence[tuple[int, int]],
    bandwidths: dict[str, float],
) -> tuple[list[str], list[list[str]]]:
    """A table: for presets and (batch, context), the bytes, and per bandwidth the floor and the limit."""
    columns = ["model", "batch", "context", "weights", "cache"]
    columns += [f"{name}: µs, tokens/s" for name in bandwidths]
    rows = []
    for preset in presets:
        for batch, context in cases:
            cost = step(PRESETS[preset], dtype, batch=batch, context=context)
            limits = [f"{cost.floor(each) * 1e6:.0f}, {cost.limit(each):,.0f}" for each in bandwidths.values()]
            rows.append([preset, str(batch), str(context), human(cost.weights), human(cost.cache), *limits])
    return columns, rows


def listed_bandwidths() -> dict[str, float]:
    """Bytes a second of known GPUs, as measured by a device copy where it was, else by the data sheet."""
    from gpukernels.gpus import GPUS

    return {
        f"{gpu.name} ({gpu.bandwidth / 1e12:.2f} TB/s)"
        if gpu.measured_bandwidth is None
        else f"{gpu.name} ({gpu.measured_bandwidth / 1e12:.2f} TB/s measured)": gpu.measured_bandwidth or gpu.bandwidth
        for gpu in GPUS.values()
    }
