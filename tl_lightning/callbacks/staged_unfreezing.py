"""Unfreezing of a backbone, stage by stage."""

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tl_lightning.freezing import HEAD
from tl_lightning.lightning_fixes.ddp_rewrap import rewrap_after_unfreezing
from tl_lightning.modules import FrozenGuard, StageSchedule, TransferClassifier
from tl_lightning.optim import stage_of_group

_NEVER = sys.maxsize


class StagedUnfreezing(BaseFinetuning, StageSchedule):
    """Train the head first, and unfreeze stages of the backbone at given epochs.

    Gradual unfreezing: https://arxiv.org/abs/1801.06146, section 3.3. The unfrozen stages are a function of the epoch
    alone, so a resumed run, a second fit and a new trainer agree. Every parameter that may ever train is in the
    optimizer from the start. Frozen parameters have no gradient, so the optimizer skips them.

    Example:
        Python: ``Trainer(callbacks=[StagedUnfreezing({3: "layer4", 6: "layer2"})])``, for a ``PartialFineTuning`` with
        ``unfreeze_from="layer2"``.
        Command line: ``--trainer.callbacks+ StagedUnfreezing --trainer.callbacks.schedule '{3: layer4, 6: layer2}'``.

    Args:
        schedule: Maps an epoch, counted from 0, to the first stage that trains from this epoch on, with all later ones:
            its name, a number k for the last k stages, or ``"head"`` for the head alone. Before the first of these
            epochs, the head trains alone.
        warmup_epochs: Epochs over which the learning rate of a newly unfrozen stage rises linearly from 0.
        stop_early: Let early stopping end the run before the last of these epochs.

    Raises:
        ValueError: The schedule is empty, or an epoch or ``warmup_epochs`` is negative.
    """

    def __init__(self, schedule: dict[int, str | int], warmup_epochs: float = 1.0, stop_early: bool = False) -> None:
        super().__init__()
        valid = isinstance(schedule, dict) and all(type(epoch) is int and epoch >= 0 for epoch in schedule)
        if not schedule or not valid:
            raise ValueError(
                f"schedule is {schedule}; it must map epochs, counted from 0, to the first stage that trains from then "
                "on, for example {3: 'layer4'}"
            )
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be a number of epochs, or 0 for no warm-up")
        self.schedule = dict(sorted(schedule.items()))
        self.warmup_epochs = warmup_epochs
        self.stop_early = stop_early
        self._patience: dict[EarlyStopping, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._saved_lrs: list[float] = []

    def stage_at(self, epoch: int) -> str | int:
        """Return the first stage of the backbone that trains in an epoch, or ``"head"``."""
        return next((stage for first, stage in reversed(self.schedule.items()) if first <= epoch), HEAD)

    def unfrozen_since(self, name: str, epoch: int, classifier: TransferClassifier) -> int | None:
        """Return the epoch since which a stage has trained without a break, or None if it is frozen in ``epoch``."""
        since = None
        for start in (0, *(first for first in self.schedule if 0 < first <= epoch)):
            trains = name in classifier.stages_from(self.stage_at(start))
            since = (start if since is None else since) if trains else None
        return since

    def warmup_factor(self, name: str, epoch: int, share: float, classifier: TransferClassifier) -> float:
        """Return the factor on the learning rate of a group while its stage warms up.

        Args:
            name: Name of the stage, or ``"head"``, which has only the warm-up of the run's scheduler.
            epoch: The epoch.
            share: Share of the epoch's batches so far, including the current one.
            classifier: The classifier.
        """
        since = self.unfrozen_since(name, epoch, classifier)
        if not since or self.warmup_epochs == 0:  # from epoch 0, the run's scheduler warms up
            return 1.0
        return min(1.0, (epoch - since + share) / self.warmup_epochs)

    # The two methods of BaseFinetuning --------------------------------------------------------------------------------

    @override
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.finetune_function(pl_module, 0, None)

    @override
    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer | None) -> None:
        """Unfreeze the stages of an epoch, and freeze all others."""
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has checked this
        pl_module.train_from(self.stage_at(epoch))

    # Hooks ------------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the schedule against the classifier, and unfreeze the stages of the current epoch.

        Raises:
            TypeError: The model is no :class:`TransferClassifier`.
            ValueError: A stage does not exist or may not train, or the strategy cannot unfreeze.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, TransferClassifier):
            raise TypeError(f"StagedUnfreezing needs a PartialFineTuning, and was given a {type(pl_module).__name__}")
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ValueError(  # noqa: TRY004 - the user has chosen a strategy that does not fit
                f"{type(trainer.strategy).__name__} cannot unfreeze parameters after training has started: use "
                "strategy 'ddp', or ModelParallelStrategy for sharding"
            )
        if not pl_module.freeze_policy.unfreezable:
            raise ValueError(
                f"{type(pl_module).__name__} never trains its backbone, so nothing can be unfrozen: use "
                "PartialFineTuning, with the earliest stage of the schedule as unfreeze_from"
            )
        for target in self.schedule.values():
            pl_module.train_from(target)  # raises if the stage does not exist or may not train
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
        self._patience = {callback: callback.patience for callback in callbacks if isinstance(callback, EarlyStopping)}
        self.finetune_function(pl_module, trainer.current_epoch, None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing, because the groups of the optimizer never change."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the stages of a resumed run, and warm up learning rates around each optimizer step.

        Raises:
            ValueError: The optimizer has parameter groups without a name.
        """
        self._apply_stage(trainer, pl_module)
        self._remove_hooks()
        for optimizer in trainer.optimizers:
            if any("name" not in group for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__} has groups without a name, so StagedUnfreezing cannot tell their "
                    "stages: instead of configure_optimizers, override parameter_groups, or pass optimizer and "
                    "scheduler as arguments"
                )
            self._hooks.append(
                optimizer.register_step_pre_hook(lambda optimizer, *_: self._scale_lrs(trainer, pl_module, optimizer))
            )
            self._hooks.append(optimizer.register_step_post_hook(lambda optimizer, *_: self._restore_lrs(optimizer)))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the stages of the epoch, and print them if they have changed."""
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has checked this
        policy = pl_module.freeze_policy
        before = policy.unfrozen
        self._apply_stage(trainer, pl_module)
        if policy.unfrozen != before:
            names = [name for name in policy.stages if name in policy.unfrozen]
            pl_module.print(
                f"epoch {trainer.current_epoch}: the head trains{', and ' if names else ' alone'}{', '.join(names)}"
            )
        if trainer.current_epoch == max(self.schedule):
            for stopping in self._patience:
                stopping.wait_count = 0  # epochs of earlier stages do not count

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the optimizer and early stopping."""
        self._restore(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the optimizer and early stopping."""
        self._restore(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the user's patience, and not the unlimited one of earlier stages."""
        for stopping, patience in self._patience.items():
            if stopping.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][stopping.state_key]["patience"] = patience

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return nothing, because the epoch determines the stages."""
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    # ------------------------------------------------------------------------------------------------------------------

    def _apply_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has checked this
        may_stop = self.stop_early or trainer.current_epoch >= max(self.schedule)
        for stopping, patience in self._patience.items():
            stopping.patience = patience if may_stop else _NEVER
        if pl_module.freeze_policy.unfrozen == frozenset(pl_module.stages_from(self.stage_at(trainer.current_epoch))):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
            if isinstance(callback, FrozenGuard):
                callback.end_stage(trainer, pl_module)
        with rewrap_after_unfreezing(trainer, pl_module):
            self.finetune_function(pl_module, trainer.current_epoch, None)

    def _scale_lrs(self, trainer: Trainer, classifier: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(classifier, TransferClassifier)  # noqa: S101 - setup has checked this
        batches = trainer.num_training_batches
        # A loader of unknown length warms up by whole epochs.
        share = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches if math.isfinite(batches) else 1.0
        self._saved_lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            stage = stage_of_group(group)
            group["lr"] = group["lr"] * self.warmup_factor(stage, trainer.current_epoch, share, classifier)

    def _restore_lrs(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._saved_lrs, strict=False):
            group["lr"] = lr
        self._saved_lrs = []

    def _restore(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            self._restore_lrs(optimizer)
        self._remove_hooks()
        for stopping, patience in self._patience.items():
            stopping.patience = patience

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
