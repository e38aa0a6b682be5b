"""Lower the rate on a plateau, before the checkpoint of that moment is written."""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

NEVER = sys.maxsize
"""As a scheduler's frequency: Lightning leaves it alone."""


class StepOnPlateau(Callback):
    """Step ``ReduceLROnPlateau`` once in each epoch that is validated, at its last validation if that ends the epoch.

    Lightning steps it after the epoch's checkpoints are written, and not again when one of them is resumed, so that every
    resumed run would have other rates (lightning.pytorch.loops.training_epoch_loop, ``on_advance_end``). A score of training (``train_...``) is looked at when the epoch ends.
    """

    def __init__(self) -> None:
        self._validated = self._stepped = -1  # the last epoch in which this was

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; what a resumed run had is loaded after this."""
        if stage == "fit":
            self._validated = self._stepped = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there will be a score.

        Raises:
            ValueError: A score of validation is monitored, and nothing is validated.
        """
        for schedule, monitor in _schedules(trainer):
            if not _of_training(monitor) and not trainer.enable_validation:
                raise ValueError(
                    f"{type(schedule).__name__} monitors {monitor!r}, and nothing is validated: monitor 'train_loss', or validate"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedule, if the epoch ends here."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = trainer.current_epoch
        ends = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
        if ends and self._stepped != trainer.current_epoch:  # else one that was interrupted after this is made up for
            self._step(trainer, of_training=False)
            self._stepped = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedule, if no validation has done so, and the epoch has not been cut short by a limit of the run."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return
        self._step(trainer, of_training=True)
        if self._validated == trainer.current_epoch != self._stepped:
            self._step(trainer, of_training=False)
            self._stepped = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return in which epochs it was validated and stepped."""
        return {"validated": self._validated, "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._validated, self._stepped = state_dict["validated"], state_dict["stepped"]

    def _step(self, trainer: Trainer, *, of_training: bool) -> None:
        for schedule, monitor in _schedules(trainer):
            if _of_training(monitor) is not of_training:
                continue
            score = trainer.callback_metrics.get(monitor)
            if score is None:
                raise ValueError(
                    f"{type(schedule).__name__} monitors {monitor!r}; there are {', '.join(sorted(trainer.callback_metrics))}"
                )
            schedule.step(float(score))


def _schedules(trainer: Trainer) -> list[tuple[ReduceLROnPlateau, str]]:
    return [
        (config.scheduler, str(config.monitor))
        for config in trainer.lr_scheduler_configs
        if isinstance(config.scheduler, ReduceLROnPlateau) and config.frequency == NEVER
    ]


def _of_training(monitor: str) -> bool:
    return monitor.startswith("train_")
