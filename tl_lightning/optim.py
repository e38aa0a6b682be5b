"""Parameter groups, the optimizer and the learning rate scheduler."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

WARMUP_FRACTION = 0.05


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], *, name: str, lr: float) -> list[dict[str, Any]]:
    """Split parameters of one learning rate into a group with weight decay and one without.

    One-dimensional parameters are biases and the scales of normalisation layers, which weight decay only harms
    (https://arxiv.org/abs/1812.01187, section 3.1). The other group has the optimizer's own weight decay.

    Args:
        parameters: The parameters with their names.
        name: Name of the group with weight decay; the other group is called ``<name>_no_decay``.
        lr: Learning rate of both groups.
    """
    members = list(parameters)
    groups = [
        {"name": name, "params": [p for _, p in members if p.ndim >= 2], "lr": lr},
        {"name": f"{name}_no_decay", "params": [p for _, p in members if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def stage_of_group(group: dict[str, Any]) -> str:
    """Return the name of the stage whose parameters a group holds, or ``"head"``."""
    return str(group.get("name")).removesuffix("_no_decay")


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None
) -> Optimizer:
    """Build the user's optimizer, or AdamW, over the parameter groups.

    Args:
        groups: The parameter groups, each with its learning rate.
        optimizer: Builds the optimizer from the groups; None builds AdamW.

    Raises:
        ValueError: The optimizer accepts no groups, has a learning rate of its own, or lost those of the groups.
    """
    if optimizer is None:
        return AdamW(groups)
    try:
        built = optimizer(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the optimizer cannot be built: {error}. It must accept parameter groups, each with its own learning "
            "rate, as AdamW and SGD do"
        ) from error
    given = inspect.signature(type(built)).parameters.get("lr")
    own = built.defaults.get("lr")
    if given is not None and own != given.default and any(group["lr"] != own for group in groups):
        raise ValueError(
            f"{type(built).__name__} was given lr={own}, which would be ignored, because the model sets the learning "
            f"rates ({', '.join(sorted({str(group['lr']) for group in groups}))}): set the rate of the model "
            "(model.init_args.lr) and leave it out of the optimizer"
        )
    wanted = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    if any(wanted.get(id(parameter)) != group["lr"] for group in built.param_groups for parameter in group["params"]):
        raise ValueError(
            f"{type(built).__name__} was built without the learning rates of the parameter groups: the function that "
            "builds the optimizer gets a list of groups and must pass it on unchanged"
        )
    return built


def build_scheduler(
    optimizer: Optimizer,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    total_steps: float | None,
) -> LRScheduler | ReduceLROnPlateau:
    """Build the user's scheduler, or warm-up and cosine, and keep the ratios between the groups' learning rates.

    Args:
        optimizer: The optimizer with the learning rates of the groups.
        scheduler: Builds the scheduler from the optimizer; None builds :func:`warmup_cosine`.
        total_steps: Optimizer steps of the whole run; only the default scheduler needs them.

    Raises:
        ValueError: The length of the run is unknown to the default scheduler, or the user's scheduler gives all groups
            the same learning rate and cannot be corrected.
    """
    if scheduler is None:
        if total_steps is None or math.isinf(total_steps):
            raise ValueError(
                "the default scheduler needs the length of the run: set max_epochs or max_steps, or choose a scheduler"
            )
        return warmup_cosine(optimizer, int(total_steps))
    before = [float(group["lr"]) for group in optimizer.param_groups]
    built = scheduler(optimizer)
    _restore_ratios(optimizer, built, before)
    return built


def _restore_ratios(optimizer: Optimizer, scheduler: LRScheduler | ReduceLROnPlateau, before: list[float]) -> None:
    """Restore the ratios between the groups' learning rates where a scheduler has set one rate for all.

    The rate given to ``OneCycleLR`` or ``CyclicLR`` becomes that of the fastest group, which is the head.

    Args:
        optimizer: The optimizer, whose learning rates the scheduler has set.
        scheduler: The scheduler.
        before: Learning rate of each group before the scheduler was built.

    Raises:
        ValueError: Another scheduler has set one rate for all.
    """
    shares = [lr / max(before) for lr in before]
    now = [float(group["lr"]) for group in optimizer.param_groups]
    if all(math.isclose(lr, max(now) * share, rel_tol=1e-6) for lr, share in zip(now, shares, strict=True)):
        return
    if len(set(now)) > 1:
        return  # the user has chosen a rate for each group
    if isinstance(scheduler, OneCycleLR):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            for key in ("initial_lr", "max_lr", "min_lr", "lr"):
                group[key] *= share
        return
    if isinstance(scheduler, CyclicLR):
        scheduler.base_lrs = [lr * share for lr, share in zip(scheduler.base_lrs, shares, strict=True)]
        scheduler.max_lrs = [lr * share for lr, share in zip(scheduler.max_lrs, shares, strict=True)]
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] *= share
        return
    names = ", ".join(f"{group.get('name')} {lr:g}" for group, lr in zip(optimizer.param_groups, before, strict=True))
    raise ValueError(
        f"{type(scheduler).__name__} gives every group the learning rate {now[0]:g}, but they had {names}: choose a "
        "scheduler that scales the learning rates, or give it one rate for each group"
    )


def warmup_cosine(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Raise the learning rates linearly over the first 5 % of the steps, then lower them to 0 along a half cosine.

    Warm-up: https://arxiv.org/abs/1706.02677; cosine: https://arxiv.org/abs/1608.03983.

    Args:
        optimizer: The optimizer; the ratios between its groups' learning rates stay.
        total_steps: Optimizer steps of the whole run.
    """
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, total_steps))


def warmup_cosine_factor(step: int, total_steps: int) -> float:
    """Return the factor on the learning rate at a step; see :func:`warmup_cosine`."""
    warmup = max(1, round(WARMUP_FRACTION * total_steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))
