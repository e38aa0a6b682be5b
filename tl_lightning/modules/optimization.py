"""Which parameters learn, how fast, and by which schedule."""

import math
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tl_lightning import optim
from tl_lightning.backbones import Backbone
from tl_lightning.freezing import HEAD, Staging
from tl_lightning.modules.plateau import NEVER


class Optimized(LightningModule):
    """A module whose optimizer has, from the start, every parameter that may ever train, in named groups."""

    backbone: Backbone
    staging: Staging
    lr: float
    optimizer: OptimizerCallable | None
    scheduler: LRSchedulerCallable | None
    scheduler_interval: Literal["epoch", "step"]
    left_out: tuple[str, ...]
    """Of a module made from a checkpoint: what the checkpoint could not bring back."""
    _rates: tuple[float, ...] = ()

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
        optimizer = optim.build_optimizer(self.parameter_groups(), self.optimizer)
        steps = self.trainer.estimated_stepping_batches if self.scheduler is None else None
        schedule = optim.build_schedule(optimizer, self.scheduler, steps)
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
                members = [(n, backbone[n]) for n in self.staging.stages[name].parameters]
            groups += optim.parameter_groups(members, name=name, lr=lr)
        return groups

    def on_train_start(self) -> None:
        """Say so where a resumed run goes on with the learning rates that it had, not with those given now."""
        for group, given in zip(self.trainer.optimizers[0].param_groups, self._rates, strict=False):
            had = group.get("initial_lr", given)
            if not math.isclose(had, given, rel_tol=1e-6):
                rank_zero_warn(
                    f"the learning rate of {group.get('name')} is {given:g} now, and the run that is resumed had {had:g}, with which it "
                    "goes on; for another rate, start a new run"
                )
                return
