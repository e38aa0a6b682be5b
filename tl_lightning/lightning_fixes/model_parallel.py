"""Checkpoints under a ModelParallelStrategy: one file, which can be scored and resumed.

Lightning saves a folder with one part for each process, loads the optimizer of a checkpoint that is only scored, and
drops the optimizer state of frozen parameters:
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/strategies/model_parallel.py. Needed
for Lightning 2.6. This file can be deleted when a ModelParallelStrategy resumes a run in which stages are frozen, from
one file.
"""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


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
