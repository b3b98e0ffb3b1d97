"""What a run of fine-tuning is told, checked before anything is read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from gpukernels.numbers import finite, whole
from model.device import DTYPES
from model.errors import TrainingError
from model.finetune.lora import Lora
from model.finetune.schedule import KINDS, Schedule

OPTIMIZERS = ("adamw", "muon")

_MOST = 2**31  # of anything that is counted: more is a slip of the hand


@dataclass(frozen=True)
class Settings:
    """The options of `LanguageModel.finetune`, all of which decide the result, but for `max_time` and `cuda_graph`.

    Data:
        validation: the share of the documents that validates, 0 to below 1; not used where validation data is given.
        context: tokens of a window; None: the model's positions, 1024 at most.
        mask_prompt, separator: see `data.read_documents`.
        seed: of the split, the order of the windows, of adapters' first values and of what is dropped.

    Length:
        epochs: how often every window is seen.
        max_steps: optimizer steps at most; the schedule ends there.
        max_time: seconds after which the run saves and ends; resumed, it has as many again.
        batch_size: windows of one forward pass, on each process.
        accumulate: forward passes of one optimizer step. The gradient is that of all their targets at once.

    Optimizer:
        optimizer: "adamw", or "muon": Muon for the matrices inside the blocks and AdamW for the rest; see
            `finetune.muon`. It is for training from scratch, or on much.
        learning_rate: the largest. schedule: see `Schedule`. floor: the smallest after the warm-up.
        warmup: optimizer steps, or below 1 their share of all.
        weight_decay: of matrices, tables of tokens and positions among them; biases and norms do not decay.
        betas, eps: of AdamW.
        clip: the largest global norm of a gradient; None: any.
        dropout: the share that is dropped of the embedded tokens and of what each block adds to them (`embd_pdrop` and
            `resid_pdrop` of GPT-2, whose 0.1 is for training from scratch). Drawn anew for every forward pass, from
            the seed. The weights of attention are never dropped: they are not in memory.

    What trains:
        freeze, unfreeze: patterns of parameter names ("blocks.0.*"). layers: a range of blocks ("2-5"). See
            `trainable.select`.
        lora_rank: adapters of this rank train, and not the weights. lora_alpha, lora_targets, lora_rank_stabilized:
            see `lora.Lora`.
        keep_adapter: write the adapter in PEFT's layout; else it is merged into the model that is written.

    Evaluation:
        evaluate_every: optimizer steps between evaluations; None: an epoch. The best weights are kept.
        patience: evaluations without a better loss after which the run ends; None: never.
        save_every: optimizer steps between checkpoints besides those of every evaluation; None: no more.

    Memory:
        fsdp: every process has a part of the parameters, gradients and moments; see `finetune.sharding`.
        recompute: compute each block again for its gradient in place of keeping what it needs.
        cuda_graph: on CUDA, launch each pass as one CUDA graph, for a host that is slower than its GPU; for one
            process, without accumulation and dropout. Not yet run on a GPU, and so not the default.
        dtype: of weights and activations: float32, float16 (with a loss scale), bfloat16; "auto": float32 on the
            CPU and the model's own on CUDA. Below float32 the exact weights are kept in float32 beside them.
    """

    epochs: int = 3
    batch_size: int = 8
    context: int | None = None
    accumulate: int = 1
    max_steps: int | None = None
    max_time: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    floor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    dropout: float = 0.0
    validation: float = 0.05
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    seed: int = 0
    mask_prompt: bool = False
    separator: str | None = None
    freeze: tuple[str, ...] = ()
    unfreeze: tuple[str, ...] = ()
    layers: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_rank_stabilized: bool = False
    keep_adapter: bool = False
    fsdp: bool = False
    recompute: bool = False
    cuda_graph: bool = False
    dtype: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Settings":
        """From keyword arguments; TrainingError for a name that is none."""
        unknown = sorted(options.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise TrainingError(f"finetune has no option {unknown[0]!r}")
        return cls(**options)

    def __post_init__(self):
        for name in ("betas", "freeze", "unfreeze", "lora_targets"):
            value = getattr(self, name)
            if name == "lora_targets" and value is None:
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TrainingError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(map(_plain, value)))
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        problems = [f"{name} must be {fault}, got {getattr(self, name)!r}" for name, fault in self._faults()]
        if problems:
            raise TrainingError(problems)
        chosen = self.lora and (self.freeze or self.unfreeze or self.layers is not None)
        if chosen:
            raise TrainingError(
                "with adapters nothing else trains: choose layers by lora_targets, not by freeze or layers"
            )
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets", "lora_rank_stabilized", "keep_adapter"):
                value = getattr(self, name)
                if value is not None and value is not False:  # an alpha of 0 is one, too
                    raise TrainingError(f"{name} is of adapters, and there are none: give lora_rank")
        if self.cuda_graph and (self.accumulate > 1 or self.dropout or self.fsdp):
            raise TrainingError(
                "cuda_graph is for whole steps of one process: it goes without accumulate, dropout, fsdp"
            )
        if self.optimizer == "muon" and (self.lora or self.fsdp):
            parts = "adapters are" if self.lora else "fsdp has"
            raise TrainingError(f"optimizer muon moves whole matrices, and {parts} parts of them: choose adamw")

    @property
    def lora(self) -> Lora | None:
        """The adapters that train, or None where the weights do."""
        if self.lora_rank is None:
            return None
        given = {"alpha": self.lora_alpha, "targets": self.lora_targets}
        given = {name: value for name, value in given.items() if value is not None}
        return Lora(self.lora_rank, rank_stabilized=self.lora_rank_stabilized, **given)

    def _faults(self):
        """(option, what it must be) for each that makes no sense."""
        for name in ("epochs", "batch_size", "accumulate"):
            if not _count(getattr(self, name)):
                yield name, "a whole number, 1 or more"
        optional = ("context", "max_steps", "evaluate_every", "patience", "save_every")
        for name in optional:
            if getattr(self, name) is not None and not _count(getattr(self, name)):
                yield name, "a whole number, 1 or more, or None"
        for name in ("epochs", "batch_size", "accumulate", *optional):
            if _count(getattr(self, name)) and getattr(self, name) > _MOST:
                yield name, f"at most {_MOST}"
        for name in (field.name for field in fields(self) if field.type is bool):
            if not isinstance(getattr(self, name), bool):  # "no" would be yes
                yield name, "True or False"
        for name in ("max_time", "clip"):
            value = getattr(self, name)
            if value is not None and not (finite(value) and value > 0):
                yield name, "a number above 0, or None"
        if not (finite(self.learning_rate) and 0 < self.learning_rate <= 1):
            yield "learning_rate", "a number above 0 and at most 1"
        elif not (finite(self.floor) and 0 <= self.floor <= self.learning_rate):
            yield "floor", f"a number from 0 to the learning rate {self.learning_rate}"
        for name in ("weight_decay", "eps", "warmup"):
            if not (finite(getattr(self, name)) and getattr(self, name) >= 0):
                yield name, "a number, 0 or more"
        if finite(self.warmup) and self.warmup >= 1 and self.warmup != int(self.warmup):
            yield "warmup", "a whole number of steps, or below 1 a share of all"
        if len(self.betas) != 2 or not all(finite(beta) and 0 <= beta < 1 for beta in self.betas):
            yield "betas", "two numbers from 0 to below 1"
        if self.optimizer not in OPTIMIZERS:
            yield "optimizer", f"one of {', '.join(OPTIMIZERS)}"
        if self.schedule not in KINDS:
            yield "schedule", f"one of {', '.join(KINDS)}"
        for name in ("validation", "dropout"):
            if not (finite(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                yield name, "a share from 0 to below 1"
        if not (whole(self.seed) and 0 <= self.seed < 2**63):
            yield "seed", "a whole number from 0 to 2**63 - 1"
        for name in ("freeze", "unfreeze", "lora_targets"):
            if not all(isinstance(pattern, str) for pattern in getattr(self, name) or ()):
                yield name, "a list of patterns, which are text"
        if not (self.layers is None or isinstance(self.layers, str)):
            yield "layers", 'a range like "2-5", or None'
        if self.dtype not in ("auto", *DTYPES):
            yield "dtype", f"{', '.join(DTYPES)} or auto"

    def window(self, positions: int) -> int:
        """The tokens of a window, for a model of so many positions."""
        if self.context is None:
            return min(positions, 1024)
        if self.context > positions:
            raise TrainingError(f"context is {self.context}, but the model has {positions} positions")
        return self.context

    def rates(self, steps: int) -> Schedule:
        """The learning rate of each of so many steps."""
        warmup = int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)
        if warmup > steps:
            raise TrainingError(f"warmup is {warmup} steps, but the run has only {steps}")
        return Schedule(self.schedule, self.learning_rate, warmup, steps, self.floor)

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it continues, as JSON has it."""
        values = asdict(self)
        del values["max_time"], values["cuda_graph"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _count(value: Any) -> bool:
    return whole(value) and value >= 1


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy's, which checkpoints in JSON and torch's seeds do not take."""
    return value.item() if isinstance(value, np.generic) else value
