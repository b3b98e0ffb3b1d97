"""Parameters, gradients and moments in shards over all ranks, by torch's FSDP2 (arXiv 2304.11277).

A rank has its rows of every parameter. Those of a block are gathered where the block computes and let go behind it,
forward and backward; those of the tables and the last norm, which forward and backward begin and end with, for the
length of each. Gradients are summed into the shards as they come. Weights reach the shards one tensor at a time.
"""

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from model.errors import TrainingError
from model.finetune.distributed import World
from model.finetune.modules import Network
from model.parameters import Slot


def outline(slots: Iterable[Slot]) -> dict[str, torch.Tensor]:
    """The parameters of a model for `Network`, shapes without memory."""
    return {slot.name: torch.empty(slot.shape, device="meta") for slot in slots}


def shard(network: Network, world: World, device: torch.device) -> None:
    """Splits a network that has no memory yet over the ranks; the values of the shards are undefined.

    Raises TrainingError where torch cannot add gradients up.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise TrainingError(f"fsdp needs a newer torch than {torch.__version__}")
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    network.to_empty(device=device)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Gradients are added up, not averaged: see `distributed.py`. gloo has no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
