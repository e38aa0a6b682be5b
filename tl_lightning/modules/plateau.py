"""Lower the rate on a plateau, before the checkpoint of that moment is written."""

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

NEVER = sys.maxsize
"""As a scheduler's frequency: Lightning leaves it alone."""


class StepOnPlateau(Callback):
    """Step ``ReduceLROnPlateau`` at the validation that ends an epoch.

    Lightning steps it after the epoch's checkpoints are written, and not again when one of them is resumed, so that every
    resumed run would have other rates (lightning.pytorch.loops.training_epoch_loop, ``on_advance_end``). A checkpoint from
    between an epoch's last batch and its validation remains inexact, since Lightning does not make up for the validation.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedule.

        Raises:
            ValueError: What it monitors was not logged.
        """
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.state.fn != "fit" or trainer.sanity_checking or done < trainer.num_training_batches:
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.frequency == NEVER:
                score = trainer.callback_metrics.get(str(config.monitor))
                if score is None:
                    raise ValueError(
                        f"ReduceLROnPlateau monitors {config.monitor!r}; there are {', '.join(sorted(trainer.callback_metrics))}"
                    )
                config.scheduler.step(float(score))
