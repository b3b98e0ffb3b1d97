"""The model as torch modules, which checkpointing, DistributedDataParallel and FSDP2 ask for.

Nothing is computed here: a module holds its slice of the parameters and calls its architecture with it.
Parameter names are those of `model.parameters`: "blocks.0.qkv.weight".
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.architecture import architecture
from model.config import Config
from model.finetune.distributed import whole
from model.parameters import grouped


def dropped(x: torch.Tensor, share: float) -> torch.Tensor:
    """x with `share` of its elements 0, and the others that much larger."""
    return nn.functional.dropout(x, share)


class Layer(nn.Module):
    """A weight, and perhaps a bias. `adapter`, where there is one, makes the weight that is used from it."""

    def __init__(self, arrays: Mapping[str, torch.Tensor]):
        super().__init__()
        self.adapter: nn.Module | None = None
        for name, tensor in arrays.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def arrays(self) -> dict[str, torch.Tensor]:
        found = dict(self._parameters)
        if self.adapter is not None:
            found["weight"] = self.adapter(self.weight)
        return found


class Layers(nn.Module):
    """Layers by name; `arrays` has their parameters as the forward pass reads them."""

    def __init__(self, arrays: Mapping[str, torch.Tensor]):
        super().__init__()
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in arrays.items():
            layer, _, short = name.partition(".")
            groups.setdefault(layer, {})[short] = tensor
        for layer, group in groups.items():
            self.add_module(layer, Layer(group))

    def arrays(self) -> dict[str, torch.Tensor]:
        layers = ((name, layer) for name, layer in self.named_children() if isinstance(layer, Layer))
        return {f"{name}.{short}": array for name, layer in layers for short, array in layer.arrays().items()}


class Block(Layers):
    """One block of the model."""

    def __init__(self, arrays: Mapping[str, torch.Tensor], config: Config, number: int):
        super().__init__(arrays)
        self.config, self.number = config, number

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor | None, dropout: float = 0.0
    ) -> torch.Tensor:
        options = {"positions": positions, "documents": documents}
        if dropout:
            options["drop"] = partial(dropped, share=dropout)
        return architecture(self.config).block(self.arrays(), self.config, self.number, x, **options)


class Network(Layers):
    """The whole model. Called, it returns the sum of the losses of a batch of windows, float32.

    Args:
        parameters: of a loaded model, by name. Those already in `dtype` are not copied.
        recompute: keep each block's input only and compute the block again for its gradient (activation
            checkpointing): less memory, a third more work.
        dropout: the share that is dropped of the embedded tokens and of what a block adds to them, where a gradient
            will be asked for.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        config: Config,
        *,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        dropout: float = 0.0,
    ):
        def tensor(array):
            array = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
            return array.detach().to(dtype or array.dtype)

        root, blocks = grouped((name, tensor(array)) for name, array in parameters.items())
        super().__init__(root)
        self.config, self.recompute, self.dropout = config, recompute, dropout
        self.blocks = nn.ModuleList(Block(group, config, number) for number, group in enumerate(blocks))

    @property
    def root(self) -> dict[str, torch.Tensor]:
        return self.arrays()

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.tokens.weight.dtype

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every argument is (B, T), as `finetune.packing.Windows` has them."""
        trains = torch.is_grad_enabled()
        dropout = self.dropout if trains else 0.0
        model = architecture(self.config)
        x = model.embed(self, tokens, positions)
        if dropout:
            x = dropped(x, dropout)
        for block in self.blocks:
            if self.recompute and trains:  # what is computed again must drop the same
                again = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
                x = checkpoint(block, x, positions, documents, dropout, **again)
            else:
                x = block(x, positions, documents, dropout)
        return model.loss(self, self.config, x, targets)

    def weight(self, name: str) -> torch.Tensor:
        """A parameter by the model's name, with its adapter merged into it: whole, for which every rank must ask."""
        path, _, short = name.rpartition(".")
        layer = self.get_submodule(path)
        found = whole(getattr(layer, short))
        if short == "weight" and layer.adapter is not None:
            found = layer.adapter.merged(found)
        return found.detach()
