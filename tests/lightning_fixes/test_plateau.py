"""``ReduceLROnPlateau`` steps once in each validated epoch, with a score of that epoch."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.doubles import TinyBackbone
from tests.staged import classifier, images, trainer
from tl_lightning.modules import PartialFineTuning


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Record each score that the scheduler gets."""

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: str = "val_loss") -> None:
        super().__init__(optimizer)
        self.monitor = monitor
        self.seen: list[float] = []

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as torch does
        self.seen.append(float(metrics))
        super().step(metrics)


class LogsScoreInTraining(PartialFineTuning):
    """Log a score in each validation except the sanity validation."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_custom", 1.0)


class ScoreRecorder(pl.Callback):
    """Record a score at the end of each epoch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics.get(self.name, -1.0)))


def fit(photos: Path, tmp_path: Path, monitor: str = "val_loss", **options: Any) -> tuple[Plateau, ScoreRecorder]:
    built: list[Plateau] = []
    model: PartialFineTuning = classifier(scheduler=lambda o: built.append(Plateau(o, monitor)) or built[0])  # type: ignore[func-returns-value]
    scores = ScoreRecorder(monitor)
    trainer(tmp_path, scores, max_epochs=4, **options).fit(model, images(photos))
    return built[0], scores


@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 2}, {"val_check_interval": 1}],
    ids=["validated once", "validated every 2 batches", "validated every batch"],
)
def test_plateau_steps_once_in_each_epoch_with_the_score_at_its_end(
    options: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    plateau, scores = fit(photos, tmp_path, **options)
    assert plateau.seen == scores.seen
    assert len(plateau.seen) == 4


def test_plateau_skips_epochs_without_validation(photos: Path, tmp_path: Path) -> None:
    plateau, scores = fit(photos, tmp_path, check_val_every_n_epoch=2)
    assert plateau.seen == scores.seen[1::2]


def test_plateau_on_train_loss_steps_with_the_mean_loss_of_the_epoch(photos: Path, tmp_path: Path) -> None:
    plateau, scores = fit(photos, tmp_path, "train_loss", limit_val_batches=0)
    assert plateau.seen == scores.seen
    assert len(set(plateau.seen)) == 4


def test_monitored_score_that_is_never_logged_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monitors 'val_loss', but the run does not validate"):
        fit(photos, tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Plateau monitors an unknown score 'val_custom'.* val_loss"):
        fit(photos, tmp_path, "val_custom")


def test_users_classifier_may_log_a_monitored_score_after_the_sanity_validation(photos: Path, tmp_path: Path) -> None:
    model = LogsScoreInTraining(TinyBackbone(), 3, unfreeze_from="layer3")
    stops = pl.callbacks.EarlyStopping("val_custom")
    with pytest.warns(UserWarning, match="monitors an unknown score 'val_custom'.*in the validation that was tried"):
        trainer(tmp_path, stops, max_epochs=1).fit(model, images(photos))
    assert stops.best_score == 1
