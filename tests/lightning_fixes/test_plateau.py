from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.doubles import TinyBackbone
from tests.staged import classifier, images, trainer
from tl_lightning.modules import PartialFineTuning


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Note each score that it is given."""

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: str = "val_loss") -> None:
        super().__init__(optimizer)
        self.monitor = monitor
        self.seen: list[float] = []

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as torch does
        self.seen.append(float(metrics))
        super().step(metrics)


class Later(PartialFineTuning):
    """Log a score when training has begun."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_glory", 1.0)


class Scores(pl.Callback):
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics.get(self.name, -1.0)))


def run(photos: Path, tmp_path: Path, monitor: str = "val_loss", **options: Any) -> tuple[Plateau, Scores]:
    made: list[Plateau] = []
    model: PartialFineTuning = classifier(scheduler=lambda o: made.append(Plateau(o, monitor)) or made[0])  # type: ignore[func-returns-value]
    scores = Scores(monitor)
    trainer(tmp_path, scores, max_epochs=4, **options).fit(model, images(photos))
    return made[0], scores


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"val_check_interval": 1}])
def test_one_step_for_each_epoch_with_its_last_score(options: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    plateau, scores = run(photos, tmp_path, **options)
    assert plateau.seen == scores.seen
    assert len(plateau.seen) == 4


def test_epochs_without_validation_count_for_nothing(photos: Path, tmp_path: Path) -> None:
    plateau, scores = run(photos, tmp_path, check_val_every_n_epoch=2)
    assert plateau.seen == scores.seen[1::2]


def test_loss_of_training_is_that_of_the_epoch(photos: Path, tmp_path: Path) -> None:
    plateau, scores = run(photos, tmp_path, "train_loss", limit_val_batches=0)
    assert plateau.seen == scores.seen
    assert len(set(plateau.seen)) == 4


def test_score_that_will_never_be_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monitors 'val_loss', but the run does not validate"):
        run(photos, tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Plateau monitors an unknown score 'val_glory'.* val_loss"):
        run(photos, tmp_path, "val_glory")


def test_class_of_ones_own_may_log_a_score_later(photos: Path, tmp_path: Path) -> None:
    model = Later(TinyBackbone(), 3, unfreeze_from="layer3")
    stops = pl.callbacks.EarlyStopping("val_glory")
    with pytest.warns(UserWarning, match="monitors an unknown score 'val_glory'.*in the validation that was tried"):
        trainer(tmp_path, stops, max_epochs=1).fit(model, images(photos))
    assert stops.best_score == 1
