"""Shard what trains over the processes of a ModelParallelStrategy."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from tl_lightning.backbones import Segment, called_by
from tl_lightning.freezing import HEAD, FreezePolicy


def configure_strategy(strategy: Strategy, stage: str) -> None:
    """Let a ModelParallelStrategy write each checkpoint as one file, and score any of them, as all others do.

    By its default it writes a folder with a part for each process, which is no classifier that could be loaded. And what is
    to be scored after a fit it reads into the optimizer as well, which fails where other parts train by then.
    """
    if isinstance(strategy, ModelParallelStrategy):
        strategy._save_distributed_checkpoint = False
        if stage != "fit":
            strategy._reset_optimizers_and_schedulers()


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer of sharded parameters the state that it had; on all ranks.

    What loads checkpoints for ModelParallelStrategy leaves out the state of what does not train at that moment, and makes one
    up for what does and had none (torch.distributed.checkpoint.state_dict, ``_split_optim_state_dict``, ``_init_optim_state``).

    Args:
        optimizer: Of the classifier.
        saved: Its state in the checkpoint, whole.
    """
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if number in saved["state"]:
                state = saved["state"][number]
                counts = () if group.get("fused") or group.get("capturable") else ("step",)
                optimizer.state[parameter] = {
                    name: value if name in counts else _as(parameter, value) for name, value in state.items()
                }


def _as(parameter: Tensor, value: Any) -> Any:
    """Return a part of an optimizer's state where torch has it: all but the count of steps, which most keep on the CPU."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def shard(classifier: LightningModule, freeze_policy: FreezePolicy, mesh: DeviceMesh) -> None:
    """Apply FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) to everything that may train.

    What never trains stays whole on every process: it has neither gradients nor optimizer state, which is what sharding
    saves.

    Args:
        classifier: Its head and further parts are sharded as they are; of the backbone, each module that a trainable stage
            calls.
        freeze_policy: Says which stages may train.
        mesh: Of the strategy; its dimension ``data_parallel`` is used.

    Raises:
        ValueError: A stage that may train has parameters outside its modules, or batch norm trains.
    """
    data_parallel = mesh["data_parallel"]
    heads = [module for name, module in classifier.named_children() if name != "backbone" and _parameters(module)]
    units = list(heads)
    if freeze_policy.boundary != HEAD:
        suffix = freeze_policy.backbone.split(freeze_policy.boundary)[1]
        parts = called_by(suffix) if isinstance(suffix, Segment) else [suffix]
        units += [part for part in parts if _parameters(part)]
    moving = units if freeze_policy.train_bn else heads
    if any(isinstance(module, _NormBase) for unit in moving for module in unit.modules()):
        raise ValueError(
            "batch norm that trains would have other statistics on each process of a ModelParallelStrategy: use strategy 'ddp', or "
            "leave out train_bn, and batch norm in the head"
        )
    covered = {id(parameter) for unit in units for parameter in unit.parameters()}
    names = [name for stage in freeze_policy.trainable for name in freeze_policy.stages[stage].parameters]
    loose = [name for name in names if id(freeze_policy.backbone.get_parameter(name)) not in covered]
    if loose:
        raise ValueError(
            f"{', '.join(loose[:5])} lies outside the modules of its stage and cannot be sharded: use strategy 'ddp', or a later "
            "stage as unfreeze_from"
        )
    freeze_policy.backbone.to(memory_format=torch.contiguous_format)  # the only layout that FSDP2 takes
    for unit in units:
        # Each unit is its own root; by default it would stay whole after a validation.
        fully_shard(unit, mesh=data_parallel, reshard_after_forward=True)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
