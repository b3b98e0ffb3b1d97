"""The decode step as one cooperative launch: who has it, where it is used, and the decoder that does.

It is used on the GPUs of `FASTER` and nowhere else, and that table is empty: the kernel compiles, and gives the
eager step's tokens under Triton's interpreter, but no GPU has run it yet. To try it on one:

    python -m bench.generate --persistent        measures it beside the others, its answers judged first
    pytest -m gpu tests/test_decoder_gpu.py      compares its tokens with the eager step's

A GPU whose run shows it equal and faster gets a row, with the date and the two figures.
"""

from collections.abc import Iterable
from typing import Any

from model.config import Config
from model.forward import output_matrix
from model.gpt2_config import ACTIVATIONS, GPT2Config
from model.graph import GraphDecoder
from model.parameters import Parameters

#: By the name that torch gives a GPU: when a persistent step was measured there, equal and faster, and the figures.
FASTER: dict[str, str] = {}


def why_not_persistent(parameters: Parameters, config: Config) -> str | None:
    """Why this model has no persistent step on its device, or None if it has. Needs Triton."""
    from gpukernels.persistent import why_not

    if not isinstance(config, GPT2Config):
        return "there is one for GPT-2 only"
    return why_not(parameters.blocks, heads=config.n_head)


def graph_decoder(parameters: Parameters, config: Config) -> type[GraphDecoder]:
    """The captured decoder that is the faster one, as far as it was measured, for a model on CUDA."""
    if not FASTER:
        return GraphDecoder
    import torch

    known = torch.cuda.get_device_name(parameters.device.device) in FASTER
    return PersistentDecoder if known and why_not_persistent(parameters, config) is None else GraphDecoder


class PersistentDecoder(GraphDecoder):
    """A `GraphDecoder` whose steps of up to 64 rows are one kernel each. Prompts are as ever.

    Raises:
        ValueError: `why_not_persistent` has a reason.
    """

    def __init__(self, parameters: Parameters, config: Config, **options: Any):
        """options: those of `GraphDecoder`."""
        from gpukernels.persistent import MOST_ROWS, PersistentStep

        super().__init__(parameters, config, **options)
        root, rows = parameters.root, min(self.rows, MOST_ROWS)
        self._most = rows
        self._persistent = PersistentStep(
            parameters.blocks,
            norm=(root["norm.weight"], root["norm.bias"]),
            head=parameters.padded[output_matrix(root)],
            table=root["tokens.weight"],
            positions=root["positions.weight"],
            keys=self.cache.keys,
            values=self.cache.values,
            lengths=self.cache.lengths,
            arrivals=self.cache.arrivals,
            x=self._x[:rows],
            scales=[config.attention_scale(layer) for layer in range(config.n_layer)],
            eps=config.layer_norm_epsilon,
            activation=ACTIVATIONS[config.activation_function],
            vocabulary=self.sampling.vocabulary,
        )

    def step_logits(self, rows: int) -> Any:
        """(n, V), what the last step of so many rows chose from."""
        return self._persistent.memory["logits"][0][:rows, : self._config.vocab_size]

    def _step(self, rows: int, extent: int, names: Iterable[str]) -> Any:
        if rows > self._most:
            return super()._step(rows, extent, names)
        return self._persistent(rows, self.sampling.arrays(names, 0, rows))
