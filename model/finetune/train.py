"""The training loop: steps, evaluations, checkpoints, and when to stop.

A step is one update of the optimizer. Its gradient is that of the mean loss over all targets of its batch,
however many forward passes and processes make it: each loss is a sum, divided by the targets of the whole.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import CheckpointError, TrainingError
from model.finetune import checkpoint
from model.finetune.batches import Batches
from model.finetune.distributed import World
from model.finetune.dropout import drawn
from model.finetune.log import Log
from model.finetune.modules import Network
from model.finetune.optimizer import LossScale, Optimizer, clipping
from model.finetune.replay import Replayed
from model.finetune.settings import Settings
from model.finetune.stop import Stop, asked_to_stop
from model.graph import Capture
from model.memory import peak_memory

# So many gradients in a row that are not finite are no accident of the loss scale, which is below 1 by then.
_HOPELESS = 30


@dataclass
class Progress:
    """What a run has come to; all of it is in its checkpoints."""

    step: int = 0  # batches met
    skipped: int = 0  # those whose gradient was not finite: they changed nothing
    tokens: int = 0  # targets that counted
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluated: int | None = None  # the step of the last evaluation
    waited: int = 0  # evaluations since the best
    skipped_in_a_row: int = 0
    loss: float | None = None  # of the last step; None where none was made, or it was not finite


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        reason: "finished" (all epochs, or max_steps), "early stopping", "max_time", or "interrupted".
        steps, skipped: optimizer steps, and how many of them had a gradient that was not finite.
        tokens: targets that counted. seconds: of the run, with those before it was resumed.
        loss: of the last step, nats a token; NaN if none was made.
        validation_loss: the best, or None without validation. best_step: where it was.
        signal: the number of the signal that interrupted, or None.
    """

    reason: str
    steps: int
    skipped: int
    tokens: int
    seconds: float
    loss: float
    validation_loss: float | None
    best_step: int | None
    signal: int | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.validation_loss is None else math.exp(min(self.validation_loss, 700))


class Trainer:
    """One run, ready to start.

    Args:
        network: with `requires_grad` of what trains.
        train, validation: the batches. No validation: no windows in it.
        started: what a run that is resumed must have in common with this one.
        out: where checkpoints go; None: nowhere.
        write: writes the network as it is: with the best weights or, without validation, the last, beside each
            checkpoint and at the end. Where it is sharded every rank calls it, else rank 0.
        capture: what passes are captured by, to be replayed. None: they are launched kernel by kernel.
    """

    def __init__(
        self,
        network: Network,
        train: Batches,
        validation: Batches,
        settings: Settings,
        *,
        world: World,
        started: Mapping[str, Any],
        out: Path | None = None,
        write: Callable[[], None] | None = None,
        capture: Capture | None = None,
    ):
        self.network, self.train, self.validation, self.settings = network, train, validation, settings
        self.world, self.started, self.out, self.write = world, started, out, write
        weight = network.tokens.weight
        self.device, self.scale = weight.device, LossScale.of(weight.dtype)
        training = [pair for pair in network.named_parameters() if pair[1].requires_grad]
        inside = [name for name, parameter in training if name.startswith("blocks.") and parameter.ndim == 2]
        self.optimizer = Optimizer(
            training,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            accumulates=settings.accumulate > 1,
            matrices=inside if settings.optimizer == "muon" else (),
        )
        self.steps = train.steps * settings.epochs
        if settings.max_steps is not None:
            self.steps = min(self.steps, settings.max_steps)
        self.rates = settings.rates(self.steps)
        self.every = settings.evaluate_every or train.steps
        self.module = network if settings.fsdp else world.replicate(network)
        self.graphs = None if capture is None else Replayed(capture)
        # Every rank has a part of what a checkpoint holds where it is sharded; else rank 0 has all.
        self.writers = world if settings.fsdp else World()
        self.writes = out is not None and (world.leads or settings.fsdp)
        self.progress, self.best, self.loss = Progress(), None, math.nan
        self.stop, self.began = Stop(), time.monotonic()

    # --- the run

    def run(self, log: Log) -> Result:
        """Trains until there is a reason to stop; the network then holds the best weights, or the last."""
        self.log = log
        self.began, before = time.monotonic(), self.progress.seconds
        with asked_to_stop() as self.stop:
            reason = self._evaluated(None)
            while reason is None and self.progress.step < self.steps:
                self._step()
                self.progress.seconds = before + time.monotonic() - self.began
                reason = self._evaluated(self._interruption())
                if reason is None and self._saves():
                    self._save()
            reason = reason or "finished"
            self._end(reason)
        return Result(
            reason,
            self.progress.step,
            self.progress.skipped,
            self.progress.tokens,
            self.progress.seconds,
            self.loss,
            self.progress.best_loss,
            self.progress.best_step,
            self.stop.signal if reason == "interrupted" else None,
        )

    def gradient(self, step: int) -> tuple[torch.Tensor, int]:
        """Leaves the gradient of a step, times the loss scale, in the optimizer.

        Returns the sum of the losses of this rank's targets, and how many targets all ranks have.
        """
        numbers = self.train.of_step(step)
        targets = self.train.targets(numbers)
        options = {"dtype": self.optimizer.first_moment.dtype, "device": self.device}
        factor = torch.full((), self.scale.value / max(1, targets), **options)
        self.optimizer.zero()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        passes = list(self.train.passes(numbers, self.device))
        for place, batch in enumerate(passes):
            if self.graphs is not None:
                total += self.graphs(self._pass, *batch, factor)
                continue
            # Gradients that torch adds up cross the network once, and are taken once.
            alone = place + 1 < len(passes) and self.optimizer.total is None
            silent = self.module.no_sync() if alone and hasattr(self.module, "no_sync") else nullcontext()
            with silent, self._drawn(step, place):
                total += self._pass(*batch, factor, taken=not alone)
        return total, targets

    def _pass(self, tokens, targets, positions, documents, factor, *, taken: bool = True) -> torch.Tensor:
        """The sum of the losses of a pass; `taken`: its gradient, and that of those before it, is the optimizer's."""
        loss = self.module(tokens, targets, positions, documents)
        (loss * factor).backward()
        if taken:
            self.optimizer.collect()
        return loss.detach()

    def _drawn(self, step: int, place: int) -> AbstractContextManager:
        """Where a forward pass of a step draws what it drops."""
        if not self.settings.dropout:
            return nullcontext()
        return drawn(self.device, self.settings.seed, step, place, self.world.rank)

    def evaluate(self) -> float | None:
        """The mean loss over the targets of validation, nats a token; None if a signal came before its end."""
        count = len(self.validation.windows.tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        targets = 0
        with torch.no_grad():
            for start in range(0, count, self.validation.whole):
                if self.world.largest(int(self.stop.signal is not None), self.device):
                    return None
                numbers = np.arange(start, min(count, start + self.validation.whole))
                targets += self.validation.targets(numbers)
                for batch in self.validation.passes(numbers, self.device):
                    total += self.network(*batch)
        return self.world.add(total).item() / targets

    def _step(self) -> None:
        began, progress = time.monotonic(), self.progress
        windows = self.train.windows.tokens[self.train.of_step(progress.step)]
        total, targets = self.gradient(progress.step)
        # The one moment in a step in which the host waits for the device.
        loss, norm = torch.stack([self.world.add(total), self._norm()]).tolist()
        self.loss, norm = loss / max(1, targets), norm / self.scale.value
        rate, scale = self.rates(progress.step - progress.skipped), self.scale.value
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step(rate, clipping(norm, self.settings.clip) / scale)
        self.scale.update(finite)
        progress.loss = self.loss if math.isfinite(self.loss) else None
        progress.step += 1
        progress.tokens += targets
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row == _HOPELESS:
            raise TrainingError(
                f"step {progress.step}: {_HOPELESS} gradients in a row are not finite: the run has diverged; "
                "try a lower learning rate"
            )
        self.log.step(
            {
                "step": progress.step,
                "epoch": progress.step / self.train.steps,
                "loss": self.loss,
                "rate": rate,
                "gradient_norm": norm,
                "tokens": targets,
                "tokens_per_second": windows.size / (time.monotonic() - began),
                "memory": self._memory(),
                "skipped": progress.skipped,
                "loss_scale": scale,
            }
        )

    def _norm(self) -> torch.Tensor:
        """The gradient's norm, () float64; of one in shards from the sum of all ranks' squares."""
        norm = self.optimizer.norm().double()
        return self.world.add(norm.square()).sqrt() if self.settings.fsdp else norm

    def _interruption(self) -> str | None:
        """Why to stop here, of all ranks: each may have got the signal, or another time, at another step."""
        # Of this process alone: a run that goes on has as long again.
        late = self.settings.max_time is not None and time.monotonic() - self.began >= self.settings.max_time
        code = self.world.largest(2 if self.stop.signal is not None else 1 if late else 0, self.device)
        return (None, "max_time", "interrupted")[code]

    # --- evaluation

    def _evaluated(self, reason: str | None) -> str | None:
        """Evaluates if it is time and nothing presses; the reason to stop then."""
        progress = self.progress
        due = progress.step % self.every == 0 or progress.step == self.steps
        if reason is not None or not due or progress.evaluated == progress.step or not self.validation.steps:
            return reason
        loss = self.evaluate()
        if loss is None:
            return "interrupted"  # a run that goes on begins with this evaluation
        progress.evaluated = progress.step
        better = loss < (math.inf if progress.best_loss is None else progress.best_loss)  # a NaN is not
        if better:
            progress.best_loss, progress.best_step, progress.waited = loss, progress.step, 0
            self.best = self.optimizer.buffers()["weight"].to("cpu", copy=True)
        else:
            progress.waited += 1
        self.log.evaluation({"step": progress.step, "validation_loss": loss, "best": better})
        patience = self.settings.patience
        return "early stopping" if patience is not None and progress.waited >= patience else None

    def _memory(self) -> int | None:
        """Bytes at most so far, on the device that trains."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()

    # --- what is kept

    def _saves(self) -> bool:
        step, every = self.progress.step, self.settings.save_every
        return step % self.every == 0 or (every is not None and step % every == 0)

    def _save(self) -> None:
        """A checkpoint, and the model so far."""
        if not self.writes:
            return
        tensors = self.optimizer.state()
        if self.best is not None:
            tensors |= {f"best/{name}": self.optimizer.view(self.best, name) for name in self.optimizer.places}
        document = {
            "version": checkpoint.VERSION,
            "progress": asdict(self.progress),
            "loss_scale": asdict(self.scale),
            "started": self.started,
        }
        checkpoint.write(self.out, self.progress.step, tensors, document, self.writers)
        if self.best is None or self.progress.best_step == self.progress.step:
            self.write()

    def _end(self, reason: str) -> None:
        if reason in ("max_time", "interrupted"):
            self._save()
        if self.best is not None:
            self.optimizer.set(self.best)
        if self.writes and self.write is not None:
            self.write()
        if self.out is not None and self.world.leads and reason not in ("max_time", "interrupted"):
            self.log.close()  # a kill before this goes on, and draws its plot
            checkpoint.drop(self.out)
        self.world.wait()

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint of a run that was started alike."""
        document = checkpoint.read_document(folder, self.started)
        self.progress = checkpoint.numbers(folder, document, "progress", Progress)
        self.scale = checkpoint.numbers(folder, document, "loss_scale", LossScale)
        progress, wanted = self.progress, self.optimizer.state()
        if folder.name != f"checkpoint-{progress.step}" or progress.skipped > progress.step:
            counts = f"step {progress.step} with {progress.skipped} skipped"
            raise CheckpointError(f"{folder}: says that it is of {counts}, which cannot be")
        if self.scale.value <= 0:
            raise CheckpointError(f"{folder}: has the loss scale {self.scale.value}, which must be above 0")
        self.loss = math.nan if progress.loss is None else progress.loss
        if progress.best_step is not None:
            parameter = self.optimizer.parameter
            wanted |= {f"best/{name}": self.optimizer.view(parameter, name) for name in self.optimizer.places}
        tensors = checkpoint.read_tensors(folder, wanted, self.writers)
        self.optimizer.restore(tensors, progress.step - progress.skipped)
        if progress.best_step is not None:
            self.best = torch.zeros_like(self.optimizer.buffers()["weight"], device="cpu")
            for name in self.optimizer.places:
                self.optimizer.view(self.best, name).copy_(tensors[f"best/{name}"])
