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

    Frozen weights are bit-identical in the average. Buffers are copied from the model, because averaging would truncate
    integer buffers. After the fit, the model has the averaged weights.

    Lightning's WeightAveraging has no public names for its average, so this class uses ``_average_model``,
    ``_copy_average_to_current`` and ``_latest_update_step`` of Lightning 2.6 (the reason for its upper bound).

    Example:
        Python: ``Trainer(callbacks=[EMA(decay=0.999)])``.
        Command line: ``--trainer.callbacks+ EMA --trainer.callbacks.decay 0.999``.

    Args:
        decay: Weight of the old average at each optimizer step; the new weights get the rest.

    Raises:
        ValueError: The decay is below 0, or not below 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1, for example 0.999")
        self._frozen: frozenset[str] | None = None
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch gives it no types
        super().__init__(use_buffers=False, multi_avg_fn=average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the average from the current weights.

        Raises:
            ValueError: The strategy shards the weights, or a checkpoint callback saves weights only.
        """
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if stage == "fit" and any(callback.save_weights_only for callback in callbacks):
            raise ValueError(
                "EMA cannot be used with ModelCheckpoint(save_weights_only=True), which would save the weights of the "
                "last step under the score of the average: leave save_weights_only out"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(  # noqa: TRY004 - the user has chosen a strategy that does not fit
                f"EMA cannot average the weights, which {type(trainer.strategy).__name__} shards: use strategy 'ddp'"
            )
        with warnings.catch_warnings():
            # The classifier's configure_model does nothing unless the strategy shards.
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
            super().setup(trainer, pl_module, stage)
        self._frozen = None
        self._training_started = self._is_swapped = False
        self._latest_update_step = trainer.global_step  # a reused callback would wait for the step of its last run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the last step, if the resumed checkpoint was saved before that."""
        self._training_started = True
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average into the model, if the resumed run was complete and no training followed."""
        if not self._training_started and self._average_model is not None and reverted(trainer) is None:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)
            self._copy_average_to_current(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the start of a stage, copy frozen weights into the average, so that they do not lag behind the model."""
        frozen = frozenset(name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad)
        if frozen != self._frozen and self._average_model is not None:
            with torch.no_grad():
                live = dict(pl_module.named_parameters())
                for name, average in self._average_model.module.named_parameters():
                    if name in frozen:
                        average.copy_(live[name])
            self._frozen = frozen

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the weights of the last step when a fit is resumed; validation and test use the average."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the average in during a fit; afterwards the model has it already."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)
            self._is_swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the weights of the last step back in."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)
            self._is_swapped = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as ``state_dict`` and the weights of the last step beside it, during a validation too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and self._is_swapped:
            states = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = states
