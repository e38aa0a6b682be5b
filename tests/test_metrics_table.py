"""The table of metrics of a run that was interrupted and resumed is that of one that was not."""

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.staged import classifier, images, trainer
from tl_lightning.metrics_table import MetricsTable, RowCount

pytestmark = pytest.mark.filterwarnings("ignore:.* directory .* exists and is not empty:UserWarning")

# Six batches an epoch. With these, two steps and three validations, of which two come at the same step; else, one each.
OFTEN: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 2}


class StoppedError(Exception):
    """The run is stopped, as by a signal."""


class Stop(pl.Callback):
    """Stop at a batch, counted from 0 over all epochs: at its start, or at the end of the validation that follows."""

    def __init__(self, at: int, validated: bool) -> None:
        self.at = at
        self.validated = validated

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at and not self.validated:
            raise StoppedError

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at and self.validated:
            raise StoppedError


def rows_of(
    folder: Path, photos: Path, moments: dict[str, Any], stop: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Run, or go on where there is a checkpoint, and return the rows of the table."""
    saves = ModelCheckpoint(folder, "saved", enable_version_counter=False, **moments)
    path = folder / "saved.ckpt"
    run = trainer(
        folder,
        *([] if stop is None else [Stop(stop, "save_on_exception" in moments)]),
        RowCount(),
        saves,
        **{"max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 1} | options,
        logger=MetricsTable(folder.parent, name="", version=folder.name),
    )
    with nullcontext() if stop is None else pytest.raises(StoppedError):
        run.fit(
            classifier(),
            images(photos, batch_size=4),
            ckpt_path=path if path.is_file() else None,
            weights_only=True,
        )
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("options", "moments"),
    [
        (OFTEN, {"every_n_train_steps": 1}),
        (OFTEN, {}),
        ({}, {"save_on_train_epoch_end": True}),
        (OFTEN, {"save_on_exception": True}),
    ],
    ids=["saved at steps", "saved at validations", "saved at the ends of epochs", "saved at errors"],
)
def test_resumed(options: dict[str, Any], moments: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    whole = rows_of(tmp_path / "whole", photos, moments, **options)
    for stop in (7, 9, 11) if "save_on_exception" in moments else (8, 10, 12):
        rows_of(tmp_path / str(stop), photos, moments, stop=stop, **options)
        rows_of(tmp_path / str(stop), photos, moments, stop=15, **options)
        assert rows_of(tmp_path / str(stop), photos, moments, **options) == whole, f"stopped before batch {stop}"
