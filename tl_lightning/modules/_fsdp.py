"""Sharding of the trainable parameters with FSDP2, under a ModelParallelStrategy."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _NormBase

from tl_lightning.backbones import Segment, called_modules
from tl_lightning.freezing import HEAD, FreezePolicy


def shard(classifier: LightningModule, freeze_policy: FreezePolicy, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to all trainable parameters.

    Frozen parameters stay whole on every process: they have neither gradients nor optimizer state, which is the memory
    that sharding saves. See https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.

    Args:
        classifier: The classifier: its head and other parts are sharded whole; of the backbone, each module that a
            trainable stage calls.
        freeze_policy: Tells which stages may train.
        mesh: The mesh of the strategy, whose dimension ``data_parallel`` is used.

    Raises:
        ValueError: A trainable stage has parameters outside its modules, or batch norm trains.
    """
    heads = [module for name, module in classifier.named_children() if name != "backbone" and _parameters(module)]
    units = list(heads)
    if freeze_policy.boundary != HEAD:
        suffix = freeze_policy.backbone.split(freeze_policy.boundary)[1]
        parts = called_modules(suffix) if isinstance(suffix, Segment) else [suffix]
        units += [part for part in parts if _parameters(part)]
    updated = units if freeze_policy.train_bn else heads
    if any(isinstance(module, _NormBase) for unit in updated for module in unit.modules()):
        raise ValueError(
            "under a ModelParallelStrategy, each process would have other batch norm statistics: use strategy 'ddp', "
            "or leave out train_bn, and batch norm in the head"
        )
    covered = {id(parameter) for unit in units for parameter in unit.parameters()}
    names = [name for stage in freeze_policy.unfreezable for name in freeze_policy.stages[stage].parameters]
    uncovered = [name for name in names if id(freeze_policy.backbone.get_parameter(name)) not in covered]
    if uncovered:
        raise ValueError(
            f"{', '.join(uncovered[:5])} lies outside the modules of its stage and cannot be sharded: use strategy "
            "'ddp', or a later stage as unfreeze_from"
        )
    freeze_policy.backbone.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other layout
    for unit in units:
        # Each unit is its own root, which by default stays whole after a validation.
        fully_shard(unit, mesh=mesh["data_parallel"], reshard_after_forward=True)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
