"""Do not let fine-tuning end below the probe that it began with."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.modules import TransferClassifier


class ProbeFallback(Callback):
    """Keep the probe when the backbone begins to train, and hand its weights back if fine-tuning ends below it.

    For linear probing, then fine-tuning (https://arxiv.org/abs/2202.10054) with :class:`StagedUnfreezing`. The probe is
    saved as ``probe.ckpt`` beside the other checkpoints, a whole classifier like them.

    Args:
        monitor: The score on validation that decides.
        mode: Whether more of it is better, or less.
    """

    def __init__(self, monitor: str = "val_accuracy", mode: Literal["max", "min"] = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.probe: str | None = None
        """Path of the probe's checkpoint, once it is there."""
        self.probe_score: float | None = None
        self.handed_back = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there is a probe to fall back on.

        Raises:
            ValueError: Nothing is unfrozen, or the backbone trains from the start.
        """
        if stage == "fit" and self._first_epoch(trainer, pl_module) in (None, 0):
            raise ValueError(
                "ProbeFallback needs epochs in which the head trains alone, and others after them: add StagedUnfreezing, with "
                "a schedule whose first epoch is above 0"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the probe before the first epoch that trains the backbone.

        Raises:
            ValueError: There is no such score on validation.
        """
        if trainer.current_epoch != self._first_epoch(trainer, pl_module):
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise ValueError(
                f"ProbeFallback compares {self.monitor!r}, which was not logged before epoch {trainer.current_epoch}; there are "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        self.probe_score = float(score)
        self.probe = str(_folder(trainer) / "probe.ckpt")
        trainer.save_checkpoint(self.probe, weights_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the probe's weights back where that is better."""
        score = trainer.callback_metrics.get(self.monitor)
        if self.probe is None or self.probe_score is None or score is None:
            return
        better = float(score) >= self.probe_score if self.mode == "max" else float(score) <= self.probe_score
        compared = f"fine-tuning ended with {self.monitor} {float(score):.4f}, the probe had {self.probe_score:.4f}"
        if better:
            rank_zero_info(f"{compared}: the fine-tuned weights stay")
            return
        saved = torch.load(self.probe, map_location="cpu", weights_only=True)
        pl_module.load_state_dict(saved["state_dict"])
        self.handed_back = True
        rank_zero_warn(
            f"{compared}: the probe's weights are handed back, as in {self.probe}. Lower backbone_lr or train fewer stages"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the probe is and what it scored."""
        return {"probe": self.probe, "probe_score": self.probe_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the probe of the run that is resumed."""
        self.probe, self.probe_score = state_dict["probe"], state_dict["probe_score"]

    def _first_epoch(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - StagedUnfreezing has made sure
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
            if isinstance(callback, StagedUnfreezing):
                epochs = (e for e, stage in callback.schedule.items() if pl_module.stages_from(stage))
                return next(epochs, None)
        return None


def _folder(trainer: Trainer) -> Path:
    checkpoints = trainer.checkpoint_callback
    if isinstance(checkpoints, ModelCheckpoint) and checkpoints.dirpath is not None:
        return Path(checkpoints.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir)
