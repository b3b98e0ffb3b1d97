"""AdamW over one buffer of all parameters that train, Muon for some of them, and the loss scale of float16.

Parameters are views of a flat buffer, matrices first: they alone decay, and the first of them may be Muon's. Their
gradients go to a second one when they are whole, by one copy: were they views of it from the start, torch would add
each of them to zeros. On CUDA an update by AdamW is one launch; on the CPU it goes through the buffers in pieces that
stay in the cache.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gpukernels import adamw
from model.finetune.distributed import local
from model.finetune.muon import muon

_ALIGNMENT = 64  # elements: every parameter begins where wide loads may
_PIECE = 2**17  # elements of an update on the CPU


@dataclass
class LossScale:
    """What float16's loss is multiplied by, so that small gradients are not rounded to 0.

    Halved when a gradient is not finite, doubled after `interval` updates in a row (Micikevicius et al.,
    arXiv 1710.03740). It is 1 and stays so where no scale is needed.
    """

    value: float = 1.0
    dynamic: bool = False
    good: int = 0  # updates since the value last changed
    interval: int = 2000

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        return cls(2.0**16, True) if dtype == torch.float16 else cls()

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        if not finite:
            self.value, self.good = self.value / 2, 0
        elif self.good + 1 == self.interval:
            self.value, self.good = self.value * 2, 0
        else:
            self.good += 1


class Optimizer:
    """AdamW with clipping by the global norm, and Muon where it is asked for.

    Args:
        named: the parameters that train, all of one dtype and device. Each is moved into the buffer, where its
            value then is. Of those that are sharded, this rank's rows are, and their gradients.
        betas, eps, weight_decay: see `gpukernels.adamw`; biases and norms do not decay.
        accumulates: several backward passes make one gradient: of a 16-bit model it is summed in float32.
        matrices: the names of those that Muon moves; none of them is sharded.

    Memory: 4 bytes a parameter for each moment, and for the exact value of one of 16 bits. Muon has one moment.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        accumulates: bool = False,
        matrices: Collection[str] = (),
    ):
        named = sorted(named, key=lambda pair: (pair[0] not in matrices, pair[1].ndim < 2))
        first = named[0][1]
        self.options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.places: dict[str, tuple[int, torch.Size]] = {}
        end = self.decayed = self.muons = 0
        for name, parameter in named:
            self.places[name] = end, (shape := local(parameter.detach()).shape)
            end += -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
            if parameter.ndim >= 2:
                self.decayed = end
            if name in matrices:
                self.muons = end
        self.matrices = [name for name, _ in named if name in matrices]

        self.shards: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.parts: list[tuple[nn.Parameter, torch.Tensor]] = []  # of the gradient, of what is not sharded

        def zeros(dtype, start=0):
            return torch.zeros(end - start, dtype=dtype, device=first.device)

        wide = torch.promote_types(first.dtype, torch.float32)
        self.parameter, self.gradient = zeros(first.dtype), zeros(first.dtype)
        self.first_moment, self.second_moment = zeros(wide), zeros(wide, self.muons)
        for name, parameter in named:
            view, gradient, here = self.view(self.parameter, name), self.view(self.gradient, name), parameter.detach()
            view.copy_(local(here))
            if local(here) is here:
                parameter.data = view
                self.parts.append((parameter, gradient))
                continue
            # FSDP2 has memory of its own for a shard, and adds to the gradient that is there.
            from torch.distributed.tensor import DTensor

            self.shards.append((view, local(here)))
            parameter.grad = DTensor.from_local(
                gradient, here.device_mesh, here.placements, run_check=False, shape=here.shape, stride=here.stride()
            )
        narrow = wide != first.dtype
        self.master = self.parameter.to(wide) if narrow else None
        self.total = zeros(wide) if narrow and accumulates else None
        self.updates = torch.zeros((), dtype=torch.int32, device=first.device)

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a flat buffer that belongs to a parameter."""
        start, shape = self.places[name]
        start -= len(self.parameter) - len(flat)  # what Muon's have none of begins behind them
        return flat[start : start + shape.numel()].view(shape)

    def zero(self) -> None:
        """Forgets the gradient."""
        for parameter, _ in self.parts:
            parameter.grad = None
        if self.shards:
            self.gradient.zero_()
        if self.total is not None:
            self.total.zero_()

    def collect(self) -> None:
        """Takes the gradients of the parameters, which then have none; those of 16 bits may join a float32 sum.

        Call it behind the last backward pass, and where there is such a sum, behind each.
        """
        found = [(part, parameter.grad) for parameter, part in self.parts if parameter.grad is not None]
        if found:
            torch._foreach_copy_(*map(list, zip(*found, strict=True)))
        for parameter, part in self.parts:
            if parameter.grad is None:
                part.zero_()
            parameter.grad = None
        if self.total is not None:
            self.total += self.gradient
            if self.shards:
                self.gradient.zero_()

    @property
    def whole(self) -> torch.Tensor:
        """The gradient of all backward passes from `zero` to `collect`, flat, times the loss scale."""
        return self.gradient if self.total is None else self.total

    def norm(self) -> torch.Tensor:
        """The gradient's global norm, times the loss scale, () float32: not finite where the gradient is not."""
        dtype = self.first_moment.dtype
        return torch.linalg.vector_norm(self.whole, dtype=dtype)

    def step(self, rate: float, scale: float = 1.0) -> None:
        """One update; the gradient is multiplied by `scale`, which undoes the loss scale and clips."""
        self.updates += 1
        self._muon(rate, scale)
        gradient, wide, device = self.whole, self.first_moment.dtype, self.parameter.device
        learning_rate = torch.full((), rate, dtype=wide, device=device)
        gradient_scale = None if scale == 1.0 else torch.full((), scale, dtype=wide, device=device)
        count = len(gradient)
        size = _PIECE if device.type == "cpu" else count
        for start in range(self.muons, count, size):
            part = slice(start, start + size)
            adamw(
                self.parameter[part],
                gradient[part],
                self.first_moment[part],
                self.second_moment[start - self.muons : start - self.muons + size],
                step=self.updates,
                learning_rate=learning_rate,
                master=None if self.master is None else self.master[part],
                gradient_scale=gradient_scale,
                decayed=min(max(self.decayed - start, 0), min(size, count - start)),
                **self.options,
            )
        self._pass_on()

    def _muon(self, rate: float, scale: float) -> None:
        exact = self.buffers()["weight"]
        for name in self.matrices:
            weight = self.view(exact, name)
            muon(
                weight,
                self.view(self.whole, name).to(weight.dtype) * scale,
                self.view(self.first_moment, name),
                learning_rate=rate,
                weight_decay=self.options["weight_decay"],
                stacked=3 if ".qkv." in name else 1,
            )
            if self.master is not None:
                self.view(self.parameter, name).copy_(weight)

    def _pass_on(self) -> None:
        """Where parameters are sharded, to where they are read from."""
        for view, shard in self.shards:
            shard.copy_(view)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The flat buffers that a checkpoint must hold: exact values and moments."""
        exact = self.parameter if self.master is None else self.master
        return {"weight": exact, "first_moment": self.first_moment, "second_moment": self.second_moment}

    def state(self) -> dict[str, torch.Tensor]:
        """Views of the buffers by "first_moment/NAME": float32, in no order that matters."""
        return {
            f"{kind}/{name}": self.view(flat, name)
            for kind, flat in self.buffers().items()
            for name in self.places
            if kind != "second_moment" or name not in self.matrices
        }

    def restore(self, state: Mapping[str, torch.Tensor], updates: int) -> None:
        """Takes the values of `state`, as it was after so many updates."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.set(self.buffers()["weight"])
        self.updates.fill_(updates)

    def set(self, exact: torch.Tensor) -> None:
        """Makes these the parameters: a flat buffer on any device."""
        self.buffers()["weight"].copy_(exact)
        if self.master is not None:
            self.parameter.copy_(self.master)
        self._pass_on()


def clipping(norm: float, most: float | None) -> float:
    """What a gradient of this norm is multiplied by, so that its norm is `most` at most."""
    return most / norm if most is not None and norm > most else 1.0
