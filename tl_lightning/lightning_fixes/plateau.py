"""Step ``ReduceLROnPlateau`` before the checkpoint of an epoch is written.

Lightning steps it after the epoch's checkpoints are saved, and not again on resume. A resumed run then has other
learning rates:
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/loops/training_epoch_loop.py,
``on_advance_end``. Needed for Lightning 2.6. This file can be deleted when Lightning steps the scheduler before it
saves.
"""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

NEVER = sys.maxsize
"""Frequency of a scheduler that Lightning shall not step."""


class StepOnPlateau(Callback):
    """Step ``ReduceLROnPlateau`` once in each validated epoch: at the validation that ends the epoch, or at its end.

    A scheduler that monitors a training score (``train_...``) is stepped at the end of the epoch.
    """

    def __init__(self) -> None:
        self._validated = self._stepped = -1  # last epoch that was validated, and stepped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the counts; the state of a resumed run is loaded later."""
        if stage == "fit":
            self._validated = self._stepped = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the monitored score will exist.

        Raises:
            ValueError: A validation score is monitored, but the run does not validate.
        """
        for schedule, monitor in _schedules(trainer):
            if not _is_training_score(monitor) and not trainer.enable_validation:
                raise ValueError(
                    f"{type(schedule).__name__} monitors {monitor!r}, but the run does not validate: monitor "
                    "'train_loss', or validate"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers of validation scores, if this validation ends the epoch."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
        if ends_epoch and self._stepped != trainer.current_epoch:  # a resumed run may repeat this validation
            self._step(trainer, training_scores=False)
            self._stepped = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the remaining schedulers, unless a limit of the run cut the epoch short."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return
        self._step(trainer, training_scores=True)
        if self._validated == trainer.current_epoch != self._stepped:
            self._step(trainer, training_scores=False)
            self._stepped = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the last epochs that were validated and stepped."""
        return {"validated": self._validated, "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last epochs that were validated and stepped."""
        self._validated, self._stepped = state_dict["validated"], state_dict["stepped"]

    def _step(self, trainer: Trainer, *, training_scores: bool) -> None:
        for schedule, monitor in _schedules(trainer):
            if _is_training_score(monitor) is not training_scores:
                continue
            score = trainer.callback_metrics.get(monitor)
            if score is None:
                raise ValueError(
                    f"{type(schedule).__name__} monitors {monitor!r}; the run logs "
                    f"{', '.join(sorted(trainer.callback_metrics))}"
                )
            schedule.step(float(score))


def _schedules(trainer: Trainer) -> list[tuple[ReduceLROnPlateau, str]]:
    return [
        (config.scheduler, str(config.monitor))
        for config in trainer.lr_scheduler_configs
        if isinstance(config.scheduler, ReduceLROnPlateau) and config.frequency == NEVER
    ]


def _is_training_score(monitor: str) -> bool:
    return monitor.startswith("train_")
