"""Sharding of the trainable parameters with FSDP2, under a ModelParallelStrategy."""

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
    """Let a ModelParallelStrategy save each checkpoint as one file, and score any checkpoint.

    By default it saves a folder with one part for each process, which no classifier can be loaded from. It also loads
    the optimizer of a checkpoint that is only scored, which fails where other stages train by then.
    """
    if isinstance(strategy, ModelParallelStrategy):
        strategy._save_distributed_checkpoint = False
        if stage != "fit":
            strategy._reset_optimizers_and_schedulers()


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer of sharded parameters, on all ranks.

    ModelParallelStrategy drops the optimizer state of frozen parameters on load, and invents a state for trainable
    parameters that had none (torch.distributed.checkpoint.state_dict, ``_split_optim_state_dict``,
    ``_init_optim_state``).

    Args:
        optimizer: The optimizer of the classifier.
        saved: Its whole state in the checkpoint.
    """
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if number in saved["state"]:
                state = saved["state"][number]
                on_cpu = () if group.get("fused") or group.get("capturable") else ("step",)
                optimizer.state[parameter] = {
                    name: value if name in on_cpu else _placed(parameter, value) for name, value in state.items()
                }


def _placed(parameter: Tensor, value: Any) -> Any:
    """Return a value of an optimizer's state on the device and with the placement of its parameter."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


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
        parts = called_by(suffix) if isinstance(suffix, Segment) else [suffix]
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
