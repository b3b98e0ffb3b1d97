"""A model whose weights stay in their files, for training in shards: no process ever has them all."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from model.device import NumpyDevice
from model.errors import ModelError
from model.load import Plan, read_tensor


class OnDisk(Mapping):
    """Parameters by name, as `Parameters` has them, each read anew and in float32 whenever it is asked for.

    Attributes:
        slots: as those of `Parameters`.
        place: the torch device that shards are to go to.
        dtype: the dtype that they are meant to have there.
    """

    def __init__(self, planned: Plan, place: str, dtype: str):
        self.slots = {slot.name: slot for slot in planned.slots}
        self.place, self.dtype = place, dtype
        self._entries, self._device = planned.entries, NumpyDevice()

    def __getitem__(self, name: str) -> np.ndarray:
        slot = self.slots[name]
        out = np.empty(slot.shape, np.float32)
        read_tensor(self._entries[name], out.T if slot.transposed else out, self._device)
        return out

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __getattr__(self, name: str) -> Any:
        if name in ("root", "blocks", "padded", "activation_dtype", "device"):
            raise ModelError(
                "the weights of this model are on disk only: it can be trained in shards, and nothing else"
            )
        raise AttributeError(name)
