"""A model whose weights stay in their files, for training in shards: no process ever has them all."""

from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import read_tensor
from model.config import generation_eos
from model.device import choose_device, choose_dtype
from model.errors import ModelError
from model.language_model import LanguageModel
from model.load import Plan, locate, plan
from model.parameters import Lazy
from model.tokenizer import Tokenizer


class OnDisk(Lazy):
    """Parameters by name, as `Parameters` has them, each read anew and in float32 whenever it is asked for.

    Attributes:
        slots: as those of `Parameters`.
        place: the torch device that shards are to go to.
        dtype: the dtype that they are meant to have there.
    """

    def __init__(self, planned: Plan, place: str, dtype: str):
        super().__init__({slot.name: slot for slot in planned.slots})
        self.place, self.dtype = place, dtype
        self._entries = planned.entries

    def __getitem__(self, name: str) -> np.ndarray:
        values = read_tensor(self._entries[name])
        return values.T if self.slots[name].transposed else values

    def __getattr__(self, name: str) -> Any:
        if name in ("root", "blocks", "padded", "activation_dtype", "device"):
            raise ModelError(
                "the weights of this model are on disk only: it can be trained in shards, and nothing else"
            )
        raise AttributeError(name)


def load_on_disk(source: str | Path, *, device: Any = "auto", dtype: Any = "auto", **hub: Any) -> LanguageModel:
    """A model that can be trained in shards (`finetune(fsdp=True)`), and nothing else: its weights are not read.

    Args:
        source: as for `model.load`.
        device, dtype: of the shards; "cpu" is plain torch here.
        hub: `revision`, `cache_dir`, `local_files_only`, `token` and `refresh` of `model.load`.

    Raises as `model.load` does.
    """
    place = choose_device(device)
    planned = plan(locate(source, **hub))
    return LanguageModel(
        planned.config,
        OnDisk(planned, place.name, choose_dtype(dtype, place, planned.stored)),
        tokenizer=Tokenizer.from_folder(planned.folder),
        eos_token_ids=generation_eos(planned.folder),
        values=planned.values,
        folder=planned.folder,
        notices=planned.notices,
    )
