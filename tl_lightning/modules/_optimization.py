"""The optimizer, its parameter groups and the learning rate schedule."""

import math
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tl_lightning import optim
from tl_lightning.backbones import Backbone
from tl_lightning.freezing import HEAD, FreezePolicy
from tl_lightning.lightning_fixes.plateau import NEVER

HEAD_TO_BACKBONE = 10
"""Ratio of the head's learning rate to that of the last stage, where no rate is given for the backbone."""

_OF_STATE = {"differentiable"}  # torch adds it to any optimizer that loads a state, but not to its groups


class OptimizationMixin(LightningModule):
    """A module whose optimizer holds, from the start, every parameter that may ever train, in named groups."""

    backbone: Backbone
    freeze_policy: FreezePolicy
    lr: float
    optimizer: OptimizerCallable | None
    scheduler: LRSchedulerCallable | None
    scheduler_interval: Literal["epoch", "step"]
    left_out: tuple[str, ...]
    """Arguments that the checkpoint of this module could not restore."""
    used_lrs: dict[str, float]
    """Learning rate of each stage at the last optimizer step; 0 for a frozen stage."""
    total_steps: int | None = None
    """Optimizer steps of the default schedule; None with another schedule."""
    _initial_lrs: tuple[float, ...] = ()
    _resumed_steps: int | None = None
    _resumed_lrs: dict[str, float]

    # Methods to override ----------------------------------------------------------------------------------------------

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate, per optimizer step, of the head and of each stage that may ever train."""
        stages = reversed(self.freeze_policy.unfreezable)
        return {HEAD: self.lr} | dict.fromkeys(stages, self.lr / HEAD_TO_BACKBONE)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: all parameters that may ever train, each in exactly one group.

        A parameter that a frozen stage uses as well is in no group.
        """
        backbone = dict(self.backbone.named_parameters())
        in_backbone = {id(parameter) for parameter in backbone.values()}
        groups = []
        for name, lr in self.learning_rates().items():
            if name == HEAD:
                members = [(n, p) for n, p in self.named_parameters() if id(p) not in in_backbone]
            else:
                members = [(n, backbone[n]) for n in self.freeze_policy.stages[name].parameters]
            groups += optim.parameter_groups(members, name=name, lr=lr)
        return groups

    # Lightning --------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over named groups, and the schedule.

        Raises:
            ValueError: A checkpoint could not restore this classifier's optimizer, the learning rate is given twice,
                or the default schedule has no length.
        """
        if self.left_out:
            raise ValueError(
                "this classifier was loaded from a checkpoint, which cannot restore its "
                f"{' and '.join(self.left_out)}; to train on, build the classifier with them and give the checkpoint "
                "to fit: trainer.fit(model, ckpt_path=...)"
            )
        groups = self.parameter_groups()
        self._check_groups(groups)
        places = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        for group in groups:  # ModelParallelStrategy saves the state in this order
            group["params"] = sorted(group["params"], key=lambda parameter: places[id(parameter)])
        optimizer = optim.build_optimizer(groups, self.optimizer)
        self.used_lrs = {}
        optimizer.register_step_post_hook(lambda optimizer, *_: self._note_lrs(optimizer))
        steps = self.trainer.estimated_stepping_batches if self.scheduler is None else None
        schedule = optim.build_scheduler(optimizer, self.scheduler, steps)
        self.total_steps = None if steps is None else int(steps)
        self._initial_lrs = tuple(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        config: LRSchedulerConfigType = {
            "scheduler": schedule,
            "interval": self.scheduler_interval if self.scheduler else "step",
        }
        if isinstance(schedule, ReduceLROnPlateau):
            config["monitor"] = getattr(schedule, "monitor", "val_loss")
            if self.scheduler_interval == "epoch":
                config["frequency"] = NEVER  # StepOnPlateau steps it
        return {"optimizer": optimizer, "lr_scheduler": config}

    # For the callback that resumes exactly ----------------------------------------------------------------------------

    def check_resume(
        self, optimizer_states: list[dict[str, Any]], total_steps: int | None, used_lrs: dict[str, float]
    ) -> None:
        """Check that a run can go on from a checkpoint.

        Args:
            optimizer_states: States of the checkpoint's optimizers.
            total_steps: Optimizer steps of the checkpoint's default schedule.
            used_lrs: Learning rate of each stage at the checkpoint's last step.

        Raises:
            ValueError: The checkpoint's optimizer has other groups, since other stages may train.
        """
        self._resumed_steps, self._resumed_lrs = total_steps, used_lrs
        had = [str(group["name"]) for s in optimizer_states for group in s.get("param_groups", []) if "name" in group]
        names = [str(group.get("name")) for group in self.parameter_groups()]
        if had and had != names:
            raise ValueError(
                f"the resumed run may train {_stages(had)}, but this one may train {_stages(names)}: resume with the "
                "same unfreeze_from, or start a new run"
            )

    def check_resumed_optimizer(self) -> None:
        """Warn where a resumed run gets other learning rates than before.

        Raises:
            ValueError: The state in the checkpoint belongs to another optimizer.
        """
        for optimizer in self.trainer.optimizers[:1]:
            for group, given in zip(optimizer.param_groups, self._initial_lrs, strict=False):
                lost = set(optimizer.defaults) - set(group) - _OF_STATE
                if lost:
                    raise ValueError(
                        f"the resumed run had another optimizer: its state lacks {', '.join(sorted(lost))}, which "
                        f"{type(optimizer).__name__} needs. Resume with the same optimizer, or start a new run"
                    )
                had = group.get("initial_lr", given)
                if not math.isclose(had, given, rel_tol=1e-6):
                    rank_zero_warn(
                        f"the learning rate of {group.get('name')} is {given:g}, but the resumed run had {had:g} and "
                        "keeps it; to change the rate, start a new run"
                    )
                    break
        if self.trainer.global_step and self._resumed_steps not in (None, self.total_steps):
            rank_zero_warn(
                f"the learning rates followed a schedule of {self._resumed_steps} steps before, and now follow one of "
                f"{self.total_steps}, since the length of the run, the batch size or the number of processes has "
                "changed: they jump"
            )
        self._resumed_steps = self.total_steps
        self.used_lrs, self._resumed_lrs = dict(self._resumed_lrs), {}

    def log_learning_rates(self) -> None:
        """Log the learning rates of the last optimizer step, as ``lr-<stage>``."""
        self.log_dict({f"lr-{name}": lr for name, lr in self.used_lrs.items()}, sync_dist=True)

    # ------------------------------------------------------------------------------------------------------------------

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        members = [id(parameter) for group in groups for parameter in group["params"]]
        missing = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in set(members)]
        if missing or len(members) != len(set(members)):
            raise ValueError(
                f"{', '.join(missing[:5]) or 'a parameter'} shall train but is in "
                f"{'no group' if missing else 'two groups'} of the optimizer: see parameter_groups() of "
                f"{type(self).__name__}"
            )

    def _note_lrs(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            stage = optim.stage_of_group(group)
            trains = stage == HEAD or stage in self.freeze_policy.unfrozen
            self.used_lrs[stage] = float(group["lr"]) if trains else 0.0


def _stages(groups: list[str]) -> str:
    return ", ".join(dict.fromkeys(optim.stage_of_group({"name": name}) for name in groups))
