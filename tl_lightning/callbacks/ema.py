"""Exponential moving average of the weights."""

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tl_lightning.callbacks.model_checkpoint import reverted


class EMA(WeightAveraging):
    """Validate and save an exponential moving average of the weights (https://arxiv.org/abs/1703.01780).

    Frozen weights are the same in the average, bit for bit, and buffers are the model's own: averaging would truncate
    those that hold integers.

    Args:
        decay: Share of the average that stays at each optimizer step.

    Raises:
        ValueError: The decay is not between 0 and 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it is a share, as 0.999")
        self._frozen: frozenset[str] | None = None
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch gives it no types

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, from the module as it is.

        Raises:
            ValueError: The strategy shards the weights, or checkpoints hold weights alone.
        """
        alone = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_weights_only]
        if stage == "fit" and alone:
            raise ValueError(
                "ModelCheckpoint(save_weights_only=True) would save the weights of the last step under the score of their average: "
                "leave it out beside EMA"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                f"{type(trainer.strategy).__name__} shards the weights, which cannot be averaged: use strategy 'ddp'"
            )
        with warnings.catch_warnings():
            # The classifier's configure_model shards, and does nothing without a strategy for that.
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
            super().setup(trainer, pl_module, stage)
        self._frozen = None
        self._begun = self._swapped = False
        self._latest_update_step = trainer.global_step  # else one that was used before waits for its old run's step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something left to train, and take in the step before if what is resumed lacks it."""
        self._begun = True
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be the average also where the run that is resumed was complete."""
        if not self._begun and self._average_model is not None and reverted(trainer) is None:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)  # the last step, if what is resumed lacks it
            self._copy_average_to_current(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Where a stage begins, let the average of what is frozen be what it is; else a re-frozen part would trail behind."""
        frozen = frozenset(name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad)
        if frozen != self._frozen and self._average_model is not None:
            with torch.no_grad():
                live = dict(pl_module.named_parameters())
                for name, average in self._average_model.module.named_parameters():
                    if name in frozen:
                        average.copy_(live[name])
            self._frozen = frozen

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights of the last step where a fit is resumed; whatever else is scored is the average."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average while training; afterwards the classifier has it already."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights of the last step."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, and those of the last step beside them, also amid a validation."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and self._swapped:
            states = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = states
