"""Unfreeze a backbone stage by stage."""

import math
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tl_lightning.freezing import HEAD
from tl_lightning.modules import FrozenGuard, StageSchedule, TransferClassifier
from tl_lightning.optim import stage_of_group

_NEVER = sys.maxsize


class StagedUnfreezing(BaseFinetuning, StageSchedule):
    """Train the head first, and from given epochs on the backbone from given stages on.

    The stage is a function of the epoch alone, so a resumed run, a second fit and a new trainer are at the right one.
    Every parameter that may ever train is in the optimizer from the start; a frozen one has no gradient and is passed
    over, and a stage's rates warm up from its own first epoch. Gradual unfreezing: https://arxiv.org/abs/1801.06146,
    section 3.3.

    Args:
        schedule: From which epoch on, counted from 0, what trains beside the head: the name of a stage, which stands for it and all after
            it; a number k for the last k stages; ``"head"`` for nothing. Before the first of these epochs, the head
            trains alone.
        warmup_epochs: Epochs over which the rates of a newly unfrozen stage rise from 0 to their value, linearly.
        stop_early: Let early stopping end the run before the last of these stages has begun.

    Raises:
        ValueError: The schedule is empty, or an epoch or ``warmup_epochs`` is negative.
    """

    def __init__(self, schedule: dict[int, str | int], warmup_epochs: float = 1.0, stop_early: bool = False) -> None:
        super().__init__()
        sound = isinstance(schedule, dict) and all(type(epoch) is int and epoch >= 0 for epoch in schedule)
        if not schedule or not sound:
            raise ValueError(f"schedule is {schedule}; it says from which epochs on what trains, as {{3: 'layer4'}}")
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; it is a number of epochs, or 0 for none")
        self.schedule = dict(sorted(schedule.items()))
        self.warmup_epochs = warmup_epochs
        self.stop_early = stop_early
        self._patience: dict[EarlyStopping, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._saved_lrs: list[float] = []

    def stage_at(self, epoch: int) -> str | int:
        """Return the stage from which on the backbone trains in an epoch."""
        return next((stage for first, stage in reversed(self.schedule.items()) if first <= epoch), HEAD)

    def first_epoch(self, name: str, epoch: int, classifier: TransferClassifier) -> int | None:
        """Return since which epoch a stage has been training without a break; None if it does not train in ``epoch``."""
        since = None
        for begin in (0, *(first for first in self.schedule if 0 < first <= epoch)):
            trains = name in classifier.stages_from(self.stage_at(begin))
            since = (begin if since is None else since) if trains else None
        return since

    def warmup(self, name: str, epoch: int, share: float, classifier: TransferClassifier) -> float:
        """Return the factor on the rate of a group: what is left of the warm-up of its stage.

        Args:
            name: Of the stage, or ``"head"``, which has the run's own warm-up alone.
            epoch: The epoch.
            share: Of the epoch's batches, the one at hand included.
            classifier: What is trained.
        """
        since = self.first_epoch(name, epoch, classifier)
        if not since or self.warmup_epochs == 0:  # from the start of the run, the schedule warms up
            return 1.0
        return min(1.0, (epoch - since + share) / self.warmup_epochs)

    # BaseFinetuning's own two methods -------------------------------------------------------------------------------

    @override
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.finetune_function(pl_module, 0, None)

    @override
    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer | None) -> None:
        """Bring the classifier to the stage of an epoch; nothing happens if it is there already."""
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has made sure
        pl_module.train_from(self.stage_at(epoch))

    # Hooks ----------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the schedule against the classifier, and take it to the stage of the epoch.

        Raises:
            TypeError: The module is no classifier of this library.
            ValueError: A stage does not exist or may not train, or the strategy cannot unfreeze.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, TransferClassifier):
            raise TypeError(f"StagedUnfreezing unfreezes a PartialFineTuning, not a {type(pl_module).__name__}")
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                f"{type(trainer.strategy).__name__} takes the parameters as they are when training begins, so nothing could "
                "be unfrozen later: use strategy 'ddp', or ModelParallelStrategy for sharding"
            )
        if not pl_module.freeze_policy.trainable:
            raise ValueError(
                f"{type(pl_module).__name__} never trains its backbone, so nothing can be unfrozen: use PartialFineTuning, with "
                "the deepest stage of the schedule as unfreeze_from"
            )
        for target in self.schedule.values():
            pl_module.train_from(target)  # raises where that cannot be
        self._patience = {c: c.patience for c in trainer.callbacks if isinstance(c, EarlyStopping)}  # type: ignore[attr-defined]  # Lightning's own list
        self.finetune_function(pl_module, trainer.current_epoch, None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the optimizer's groups never change."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the stage of a resumed run, and warm rates up around each step of the optimizer.

        Raises:
            ValueError: The optimizer does not have the groups of this library's classifiers.
        """
        self._go_to_stage(trainer, pl_module)
        self._unhook()
        for optimizer in trainer.optimizers:
            if any("name" not in group for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__} has groups without a name, so their stages are not known: instead of "
                    "configure_optimizers, override parameter_groups, or give optimizer and scheduler as arguments"
                )
            self._hooks.append(
                optimizer.register_step_pre_hook(lambda optimizer, *_: self._scale(trainer, pl_module, optimizer))
            )
            self._hooks.append(optimizer.register_step_post_hook(lambda optimizer, *_: self._restore(optimizer)))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the stage of the epoch, and say so where it is another one."""
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has made sure
        before = pl_module.freeze_policy.trained
        self._go_to_stage(trainer, pl_module)
        if pl_module.freeze_policy.trained != before:
            names = [name for name in pl_module.freeze_policy.stages if name in pl_module.freeze_policy.trained]
            pl_module.print(
                f"epoch {trainer.current_epoch}: the head trains{', and ' if names else ' alone'}{', '.join(names)}"
            )
        if trainer.current_epoch == max(self.schedule):
            for stopping in self._patience:
                stopping.wait_count = 0  # of the stage before

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizer and early stopping as they were."""
        self._let_go(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer and early stopping as they were."""
        self._let_go(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the user's patience, which may be on hold."""
        for stopping, patience in self._patience.items():
            if stopping.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][stopping.state_key]["patience"] = patience

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the epoch says it all."""
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    # ----------------------------------------------------------------------------------------------------------------

    def _go_to_stage(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - setup has made sure
        begun = trainer.current_epoch >= max(self.schedule)
        for stopping, patience in self._patience.items():
            stopping.patience = patience if begun or self.stop_early else _NEVER
        if pl_module.freeze_policy.trained == frozenset(pl_module.stages_from(self.stage_at(trainer.current_epoch))):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
            if isinstance(callback, FrozenGuard):
                callback.end_stage(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for module in pl_module.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # else the parameters at hand are views, whose requires_grad nobody looks at
        self.finetune_function(pl_module, trainer.current_epoch, None)
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
            # DDP reduces what required gradients when it wrapped the module, and nothing that does so later:
            # https://github.com/Lightning-AI/pytorch-lightning/issues/20340
            strategy.model = pl_module
            strategy.configure_ddp()

    def _scale(self, trainer: Trainer, classifier: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(classifier, TransferClassifier)  # noqa: S101 - setup has made sure
        batches = trainer.num_training_batches
        # A loader that does not know its length warms up by whole epochs.
        share = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches if math.isfinite(batches) else 1.0
        self._saved_lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            stage = stage_of_group(group)
            group["lr"] = group["lr"] * self.warmup(stage, trainer.current_epoch, share, classifier)

    def _restore(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._saved_lrs, strict=False):
            group["lr"] = lr
        self._saved_lrs = []

    def _let_go(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            self._restore(optimizer)
        self._unhook()
        for stopping, patience in self._patience.items():
            stopping.patience = patience

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
