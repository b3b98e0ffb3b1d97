"""One process or several: who this is, and the few things that ranks must agree on.

`torchrun` says in the environment how many processes there are. Gradients are added up, not averaged: every
rank divides its losses by the number of targets of the whole batch, which it can count by itself.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

#: How long a rank waits for another that says nothing.
PATIENCE = timedelta(minutes=10)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor: of one that is sharded its rows, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of one that is sharded it is gathered, for which every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of all ranks' values, which they exchange through `device`."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def agree(self, value: int, device: torch.device) -> bool:
        """Whether all ranks have the same value."""
        return self.largest(value, device) == -self.largest(-value, device)

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network as DistributedDataParallel: its gradients are the sums over all ranks."""
        if self.size == 1:
            return network

        # DistributedDataParallel's own hook would divide by the number of ranks.
        def add(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return done.then(lambda future: future.value()[0])

        # Among three ranks and more the bits of a sum depend on its place in what is summed at once, and behind the
        # first step of a process buckets are others: a run that goes on would differ. On the CPU, where it must not,
        # there is one bucket, summed in an order of our own.
        def add_in_order(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
            gradients = [gradient for _, gradient in sorted(pairs, key=lambda pair: numbers[pair[0]])]
            sums = self.add(torch.cat([each.flatten() for each in gradients]))
            for gradient, part in zip(gradients, sums.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        numbers = {parameter: number for number, parameter in enumerate(network.parameters())}
        on_cpu = next(network.parameters()).device.type == "cpu"
        # Its sums are the gradients, and not copied to them.
        options = {"gradient_as_bucket_view": True, "bucket_cap_mb": 2**40 if on_cpu else None}
        wrapped = DistributedDataParallel(network, **options)
        wrapped.register_comm_hook(None, add_in_order if on_cpu else add)
        return wrapped

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


def launched() -> bool:
    """Whether `torchrun`, or what stands in for it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes that train together, joined while the context lasts.

    A group that is there already is used and left alone. After an error the group is not closed politely, which
    would wait for the others: the process ends, and its launcher ends them.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if not launched():
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def fill(network: nn.Module, values: Iterable[tuple[str, Any]], world: World) -> None:
    """Gives parameters their values, one after the other: whole arrays of NumPy or torch."""
    parameters = dict(network.named_parameters())
    for name, value in values:
        mine = local(parameters[name].detach())
        if mine.shape != value.shape:
            rows = -(-len(value) // world.size)  # as torch.chunk, and so FSDP2, splits
            value = value[rows * world.rank :][:rows]
        mine.copy_(torch.as_tensor(value))
