"""Shard what trains over the processes of a ModelParallelStrategy."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tl_lightning.backbones import Segment, called_by
from tl_lightning.freezing import HEAD, Staging


def shard(classifier: LightningModule, staging: Staging, mesh: DeviceMesh) -> None:
    """Apply FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) to everything that may train.

    What never trains stays whole on every process: it has neither gradients nor optimizer state, which is what sharding
    saves.

    Args:
        classifier: Its head and further parts are sharded as they are; of the backbone, each module that a trainable stage
            calls.
        staging: Says which stages may train.
        mesh: Of the strategy; its dimension ``data_parallel`` is used.

    Raises:
        ValueError: A stage that may train has parameters outside its modules.
    """
    data_parallel = mesh["data_parallel"]
    units = [module for name, module in classifier.named_children() if name != "backbone" and _parameters(module)]
    if staging.boundary != HEAD:
        suffix = staging.backbone.split(staging.boundary)[1]
        parts = called_by(suffix) if isinstance(suffix, Segment) else [suffix]
        units += [part for part in parts if _parameters(part)]
    covered = {id(parameter) for unit in units for parameter in unit.parameters()}
    names = [name for stage in staging.trainable for name in staging.stages[stage].parameters]
    loose = [name for name in names if id(staging.backbone.get_parameter(name)) not in covered]
    if loose:
        raise ValueError(
            f"{', '.join(loose[:5])} lies outside the modules of its stage and cannot be sharded: use strategy 'ddp', or a later "
            "stage as unfreeze_from"
        )
    staging.backbone.to(memory_format=torch.contiguous_format)  # the only layout that FSDP2 takes
    for unit in units:
        # Each unit is its own root; by default it would stay whole after a validation.
        fully_shard(unit, mesh=data_parallel, reshard_after_forward=True)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
