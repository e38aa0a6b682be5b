"""Which parameters learn, how fast, and by which schedule."""

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


class OptimizationMixin(LightningModule):
    """A module whose optimizer has, from the start, every parameter that may ever train, in named groups."""

    backbone: Backbone
    freeze_policy: FreezePolicy
    lr: float
    optimizer: OptimizerCallable | None
    scheduler: LRSchedulerCallable | None
    scheduler_interval: Literal["epoch", "step"]
    left_out: tuple[str, ...]
    """Of a module made from a checkpoint: what the checkpoint could not bring back."""
    used_lrs: dict[str, float]
    """Rate of each group at the last step of the optimizer, by stage; 0 for one that does not train now."""
    total_steps: int | None = None
    """Steps that the default schedule is made for; None with another one."""
    _rates: tuple[float, ...] = ()
    _resumed_steps: int | None = None
    _resumed_lrs: dict[str, float]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over named groups, and the schedule.

        Raises:
            ValueError: This classifier comes from a checkpoint, which does not bring back the optimizer that it had; or the
                learning rate is given twice; or the schedule needs an end that the run has not.
        """
        if self.left_out:
            raise ValueError(
                f"this classifier was made from a checkpoint, which does not bring back its {' and '.join(self.left_out)}; to "
                "train on, make the classifier with them and give the checkpoint to fit: trainer.fit(model, ckpt_path=...)"
            )
        groups = self.parameter_groups()
        self._check_groups(groups)
        places = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        for group in groups:  # in the order in which the state of sharded parameters is saved
            group["params"] = sorted(group["params"], key=lambda parameter: places[id(parameter)])
        optimizer = optim.build_optimizer(groups, self.optimizer)
        self.used_lrs = {}
        optimizer.register_step_post_hook(lambda optimizer, *_: self._note_rates(optimizer))
        steps = self.trainer.estimated_stepping_batches if self.scheduler is None else None
        schedule = optim.build_schedule(optimizer, self.scheduler, steps)
        self.total_steps = None if steps is None else int(steps)
        self._rates = tuple(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        config: LRSchedulerConfigType = {
            "scheduler": schedule,
            "interval": self.scheduler_interval if self.scheduler else "step",
        }
        if isinstance(schedule, ReduceLROnPlateau):
            config["monitor"] = getattr(schedule, "monitor", "val_loss")
            if self.scheduler_interval == "epoch":
                config["frequency"] = NEVER  # StepOnPlateau does it
        return {"optimizer": optimizer, "lr_scheduler": config}

    def learning_rates(self) -> dict[str, float]:
        """Return the rate, per optimizer step, of the head and of each stage that may ever train."""
        return {HEAD: self.lr}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the optimizer: everything that may ever train, from the start, each parameter in one group.

        A parameter that frozen parts use as well is in none.
        """
        backbone = dict(self.backbone.named_parameters())
        own = {id(parameter) for parameter in backbone.values()}
        groups = []
        for name, lr in self.learning_rates().items():
            if name == HEAD:
                members = [(n, p) for n, p in self.named_parameters() if id(p) not in own]
            else:
                members = [(n, backbone[n]) for n in self.freeze_policy.stages[name].parameters]
            groups += optim.parameter_groups(members, name=name, lr=lr)
        return groups

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        members = [id(parameter) for group in groups for parameter in group["params"]]
        missing = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in set(members)]
        if missing or len(members) != len(set(members)):
            raise ValueError(
                f"{', '.join(missing[:5]) or 'a parameter'} is to train and is in {'no group' if missing else 'two groups'} of the "
                f"optimizer: look at parameter_groups() of {type(self).__name__}"
            )

    def check_resume(
        self, optimizer_states: list[dict[str, Any]], total_steps: int | None, used_lrs: dict[str, float]
    ) -> None:
        """Look whether a run can go on from a checkpoint.

        Args:
            optimizer_states: What the optimizers were.
            total_steps: What the default schedule was made for.
            used_lrs: HeadOptions of the last step.

        Raises:
            ValueError: The optimizer had other groups, since other stages may train.
        """
        self._resumed_steps, self._resumed_lrs = total_steps, used_lrs
        had = [str(group.get("name")) for state in optimizer_states for group in state.get("param_groups", [])]
        names = [str(group.get("name")) for group in self.parameter_groups()]
        if had and had != names:
            raise ValueError(
                f"the run that is resumed may train {_stages(had)}, and this one {_stages(names)}: resume with the "
                "unfreeze_from that it had, or start a new run"
            )

    def on_train_start(self) -> None:
        """Say so where a resumed run cannot go on as it was.

        Raises:
            ValueError: Another optimizer made the checkpoint's state.
        """
        optimizer = self.trainer.optimizers[0]
        for group, given in zip(optimizer.param_groups, self._rates, strict=False):
            # torch adds the last one to any optimizer that takes up a state, and never to its groups.
            lost = set(optimizer.defaults) - set(group) - {"differentiable"}
            if lost:
                raise ValueError(
                    f"the run that is resumed had another optimizer, since its state lacks {', '.join(sorted(lost))}, which "
                    f"{type(optimizer).__name__} needs: resume with the optimizer that it had, or start a new run"
                )
            had = group.get("initial_lr", given)
            if not math.isclose(had, given, rel_tol=1e-6):
                rank_zero_warn(
                    f"the learning rate of {group.get('name')} is {given:g} now, and the run that is resumed had {had:g}, with which it "
                    "goes on; for another rate, start a new run"
                )
                break
        if self.trainer.global_step and self._resumed_steps not in (None, self.total_steps):
            rank_zero_warn(
                f"the learning rates followed a schedule of {self._resumed_steps} steps before, and follow one of {self.total_steps} "
                "now, since the length of the run, the batch size or the number of processes has changed: they jump"
            )
        self._resumed_steps = self.total_steps
        self.used_lrs, self._resumed_lrs = dict(self._resumed_lrs), {}

    def on_train_epoch_end(self) -> None:
        """Log the learning rates that were used, as ``lr-<stage>``."""
        self.log_dict({f"lr-{name}": lr for name, lr in self.used_lrs.items()}, sync_dist=True)

    def _note_rates(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            stage = optim.stage_of_group(group)
            self.used_lrs[stage] = float(group["lr"]) if stage == HEAD or stage in self.freeze_policy.trained else 0.0


def _stages(groups: list[str]) -> str:
    return ", ".join(dict.fromkeys(optim.stage_of_group({"name": name}) for name in groups))
