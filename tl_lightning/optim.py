"""Optimizers over named groups, and schedules."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

WARMUP_SHARE = 0.05


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], *, name: str, lr: float) -> list[dict[str, Any]]:
    """Make optimizer groups of parameters that share a learning rate; scales and biases are not decayed.

    A parameter of one dimension is a bias or the scale of a norm, which weight decay only harms
    (https://arxiv.org/abs/1812.01187, section 3.1). The decayed group takes the optimizer's own weight decay.

    Args:
        parameters: Parameters by name.
        name: Name of the decayed group; the other one has ``_no_decay`` after it.
        lr: Learning rate per step.
    """
    members = list(parameters)
    groups = [
        {"name": name, "params": [p for _, p in members if p.ndim >= 2], "lr": lr},
        {"name": f"{name}_no_decay", "params": [p for _, p in members if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def stage_of_group(group: dict[str, Any]) -> str:
    """Return the name of the stage, or ``"head"``, that a group's parameters are of."""
    return str(group.get("name")).removesuffix("_no_decay")


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None
) -> Optimizer:
    """Build the user's optimizer, or AdamW, over the groups.

    Raises:
        ValueError: The optimizer takes no groups, or brings a learning rate of its own beside those of the groups, or has lost theirs.
    """
    if optimizer is None:
        return AdamW(groups)
    try:
        built = optimizer(groups)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the optimizer cannot be made: {error}. It has to take groups of parameters, each with its own rate, as AdamW and "
            "SGD do"
        ) from error
    given = inspect.signature(type(built)).parameters.get("lr")
    own = built.defaults.get("lr")
    if given is not None and own != given.default and any(group["lr"] != own for group in groups):
        raise ValueError(
            f"{type(built).__name__} was given lr={own}, which would be ignored: the learning rates are the "
            f"module's own ({', '.join(sorted({str(group['lr']) for group in groups}))}). Give the rate to the module "
            "(model.init_args.lr) and leave it out of the optimizer"
        )
    wanted = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    if any(wanted.get(id(parameter)) != group["lr"] for group in built.param_groups for parameter in group["params"]):
        raise ValueError(
            f"{type(built).__name__} was made without the groups' learning rates; hand what the optimizer's maker is called "
            "with to the optimizer as it is, a list of groups"
        )
    return built


def build_schedule(
    optimizer: Optimizer,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    total_steps: float | None,
) -> LRScheduler | ReduceLROnPlateau:
    """Build the user's schedule, or warm-up and cosine, over groups whose rates keep their ratios.

    Args:
        optimizer: Has the rates of the groups.
        scheduler: The user's choice.
        total_steps: Optimizer steps of the run, for warm-up and cosine.

    Raises:
        ValueError: The default schedule needs an end that the run has not; or the user's one gives groups of different rates
            the same one, in a way that cannot be put right.
    """
    if scheduler is None:
        if total_steps is None or math.isinf(total_steps):
            raise ValueError("the schedule needs the length of the run: set max_epochs or max_steps, or a scheduler")
        return warmup_cosine(optimizer, int(total_steps))
    before = [float(group["lr"]) for group in optimizer.param_groups]
    schedule = scheduler(optimizer)
    keep_ratios(optimizer, schedule, before)
    return schedule


def keep_ratios(optimizer: Optimizer, schedule: LRScheduler | ReduceLROnPlateau, before: list[float]) -> None:
    """Put back the ratios between the rates of the groups where a schedule with one rate for all has flattened them.

    The rate that was given to ``OneCycleLR`` or ``CyclicLR`` becomes that of the fastest group, which is the head.

    Args:
        optimizer: The schedule has set its rates.
        schedule: Any schedule.
        before: Rate of each group before that.

    Raises:
        ValueError: Another schedule has flattened them.
    """
    shares = [lr / max(before) for lr in before]
    now = [float(group["lr"]) for group in optimizer.param_groups]
    if all(math.isclose(lr, max(now) * share, rel_tol=1e-6) for lr, share in zip(now, shares, strict=True)):
        return
    if len(set(now)) > 1:
        return  # the user's own rate for each group
    if isinstance(schedule, OneCycleLR):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            for key in ("initial_lr", "max_lr", "min_lr", "lr"):
                group[key] *= share
        return
    if isinstance(schedule, CyclicLR):
        schedule.base_lrs = [lr * share for lr, share in zip(schedule.base_lrs, shares, strict=True)]
        schedule.max_lrs = [lr * share for lr, share in zip(schedule.max_lrs, shares, strict=True)]
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] *= share
        return
    names = ", ".join(f"{group.get('name')} {lr:g}" for group, lr in zip(optimizer.param_groups, before, strict=True))
    raise ValueError(
        f"{type(schedule).__name__} gives every group the rate {now[0]:g}, where they had {names}; choose a schedule that "
        "scales the rates, or give it one rate for each group"
    )


def warmup_cosine(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Raise every group's rate linearly over the first 5 % of the steps, then let it fall to 0 along a half cosine.

    Warm-up: https://arxiv.org/abs/1706.02677; cosine: https://arxiv.org/abs/1608.03983.

    Args:
        optimizer: Its groups keep their ratios.
        total_steps: Optimizer steps of the whole run.
    """
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, total_steps))


def warmup_cosine_factor(step: int, total_steps: int) -> float:
    """Return the share of its rate that a group has at a step; see :func:`warmup_cosine`."""
    warmup = max(1, round(WARMUP_SHARE * total_steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))
