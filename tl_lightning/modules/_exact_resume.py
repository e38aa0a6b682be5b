"""The callback behind every run: it makes resuming exact, and makes the checks that Lightning lacks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus

from tl_lightning.lightning_fixes import atomic_checkpoints, checks
from tl_lightning.lightning_fixes.finite_guard import FiniteGuard
from tl_lightning.lightning_fixes.model_parallel import configure_strategy, load_optimizer_state
from tl_lightning.lightning_fixes.plateau import StepOnPlateau
from tl_lightning.lightning_fixes.sigterm import SigtermHandler, ends_together
from tl_lightning.lightning_fixes.startup import end_start, watch_start
from tl_lightning.lightning_fixes.step_boundary import StepBoundary, finish_epoch
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.modules._frozen_guard import FrozenGuard
from tl_lightning.modules._stages import StagesMixin
from tl_lightning.utils.distributed import all_gather_object
from tl_lightning.utils.memory import keep_freed_memory
from tl_lightning.utils.seeding import run_seed, seed_torch

if TYPE_CHECKING:
    from tl_lightning.modules.base import TransferClassifier


def attach_callbacks(trainer: Trainer) -> None:
    """Add the callbacks that every run needs and the trainer does not have yet.

    This does not use ``configure_callbacks``, which stays free for subclasses.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    present = {type(callback) for callback in callbacks}
    needed = (FrozenGuard, FiniteGuard, StepOnPlateau, SigtermHandler, ExactResume)
    missing: list[Callback] = [callback() for callback in needed if callback not in present]
    if missing:
        watch_start(trainer)
        _set_callbacks(trainer, callbacks + missing)


class ExactResume(Callback):
    """Make a resumed run end with the bits of an uninterrupted one.

    The bookkeeping is a callback and not part of the classifier's own hooks, so that a subclass may override any hook
    without calling ``super()``.
    """

    def __init__(self) -> None:
        self._boundary = StepBoundary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check classifier, data and trainer against each other, and take the class names from the data.

        Raises:
            ValueError: The data has other classes or another preprocessing, a callback conflicts with the classifier,
                or the classifier cannot be saved.
        """
        end_start()
        classifier = _classifier(pl_module)
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        configure_strategy(trainer.strategy, stage)
        atomic_checkpoints.install(trainer.strategy, partial(checkpoints.read_for_trainer, classifier))
        if stage == "fit":
            checkpoints.check(classifier)  # again: parts may have been replaced since construction
            checks.check_callbacks(trainer)
        data = getattr(trainer, "datamodule", None)
        checks.check_preprocessing(data, classifier.backbone.preprocessing)
        if stage != "predict":
            classifier.class_names = checks.class_names(data, classifier.num_classes, classifier.class_names)
        # Last, also after those of configure_callbacks: on_save_checkpoint hashes the weights that others may replace.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        _set_callbacks(trainer, [*others, self])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks resume from the same checkpoint."""
        checks.check_checkpoint(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new epoch, or continue the resumed one."""
        classifier = _classifier(pl_module)
        classifier.check_resumed_optimizer()
        if self._boundary.resume(trainer, classifier.train_loss) and bool(classifier.train_loss.count):
            classifier.train_loss.update(torch.zeros((), device=classifier.device), 0)
            classifier.log_train_loss()  # no batch is left in this epoch to log it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enforce the freeze policy, take a snapshot, and seed dropout by the place in the run."""
        classifier = _classifier(pl_module)
        classifier.freeze_policy.enforce()
        self._boundary.snapshot(trainer, classifier, classifier.freeze_policy, classifier.train_loss)
        seed_torch(run_seed(), "step", trainer.global_step, batch_idx, trainer.global_rank)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, after the sanity validation, that the monitored scores exist."""
        if trainer.sanity_checking:
            checks.check_monitors(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the learning rates, and let the next epoch start at its first batch."""
        _classifier(pl_module).log_learning_rates()
        trainer.fit_loop.epoch_loop.restarting = False  # Lightning resets it only when a batch was left

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Move the checkpoint back to the last optimizer step, and describe the classifier in it."""
        classifier = _classifier(pl_module)
        loss = self._boundary.rewind(trainer, checkpoint, classifier.train_loss)
        # An interrupted rank may be alone, so it must not wait for the others.
        alone = trainer.state.status == TrainerStatus.INTERRUPTED and not ends_together(trainer)
        checkpoint[checkpoints.KEY] = checkpoints.describe(classifier, checkpoint["state_dict"]) | {
            "total_steps": classifier.total_steps,
            "used_lrs": dict(classifier.used_lrs),
            "train_loss": [loss.tolist()] if alone else all_gather_object(loss.tolist()),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the progress counts and the optimizer state that Lightning restores wrongly.

        Raises:
            ValueError: The checkpoint's optimizer has other groups, since other stages may train; or it is damaged.
        """
        classifier = _classifier(pl_module)
        if not atomic_checkpoints.is_installed(trainer.strategy):  # a plugin of the user has read it
            checkpoints.check_weights(str(trainer.ckpt_path), checkpoint, classifier.state_dict())
        checks.load_data_state(getattr(trainer, "datamodule", None), checkpoint)
        if trainer.state.fn != "fit":
            return
        place = checkpoint.get(checkpoints.KEY, {})
        classifier.check_resume(
            checkpoint.get("optimizer_states", []), place.get("total_steps"), place.get("used_lrs", {})
        )
        self._boundary.load_state(checkpoint, place.get("train_loss", []))
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                load_optimizer_state(optimizer, saved)
        if trainer.max_steps != -1:
            finish_epoch(checkpoint)


def _set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Set the callbacks, those that save checkpoints last, as Lightning orders them."""
    ordered = sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))
    trainer.callbacks = ordered  # type: ignore[attr-defined]  # set by Lightning


def _classifier(module: LightningModule) -> TransferClassifier:
    if not isinstance(module, StagesMixin):
        raise TypeError(
            f"this trainer has trained a TransferClassifier, whose callbacks cannot run a {type(module).__name__}: "
            "make a new trainer"
        )
    return cast("TransferClassifier", module)  # only a TransferClassifier attaches this callback
