"""The table of metrics of a run that was interrupted and resumed is that of one that was not."""

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from tests.staged import classifier, images, trainer
from tl_lightning.lightning_fixes.metrics_log import CSVRowCount, ResumableCSVLogger

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
        CSVRowCount(),
        saves,
        **{"max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 1} | options,
        logger=table_at(folder),
    )
    with nullcontext() if stop is None else pytest.raises(StoppedError):
        run.fit(
            classifier(),
            images(photos, batch_size=4),
            ckpt_path=path if path.is_file() else None,
            weights_only=True,
        )
    return written(folder / "metrics.csv")


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


def written(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


class Compare(pl.Callback):
    """Count, behind each checkpoint, the rows that it knows of and those on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step:
            known = torch.load(self.folder / "saved.ckpt", weights_only=True)["metrics_table"]["rows"]
            self.counts.append((known, len(written(self.folder / "metrics.csv"))))


def test_rows_that_a_checkpoint_knows_of_are_on_disk(photos: Path, tmp_path: Path) -> None:
    compare, table = Compare(tmp_path), table_at(tmp_path)
    saves = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=1, enable_version_counter=False)
    rates = LearningRateMonitor("step")  # which does not write what it logs
    options = {"max_epochs": 1, "enable_checkpointing": True, "log_every_n_steps": 1, "logger": table}
    trainer(tmp_path, rates, saves, CSVRowCount(), compare, **options).fit(classifier(), images(photos, batch_size=4))
    assert [known for known, _ in compare.counts] == [1, 2, 3, 4, 5]
    assert all(there >= known for known, there in compare.counts)


def table_at(folder: Path) -> ResumableCSVLogger:
    return ResumableCSVLogger(folder.parent, name="", version=folder.name)


@pytest.mark.parametrize(
    ("harm", "left"),
    [
        (lambda text: text, "012"),
        (lambda text: text[: text.index("0.7") + 2], "01"),
        (lambda text: text.replace("0.6", "0.6,7,7"), "012"),
        (lambda text: text.replace("step", "stop"), ""),
        (lambda text: text[:2], ""),
        (lambda text: "", ""),
    ],
    ids=["none", "cut in a row", "too many values", "other columns", "cut in the header", "empty"],
)
def test_table_that_was_harmed(harm: Any, left: str, tmp_path: Path) -> None:
    first = table_at(tmp_path)
    for step in range(4):
        first.log_metrics({"value": 0.5 + step / 10}, step)
    first.save()
    table = tmp_path / "metrics.csv"
    table.write_text(harm(table.read_text()))
    again = table_at(tmp_path)
    again.steps = 3  # the fourth row came after the checkpoint, and is not logged again
    again.log_metrics({"value": 2.5}, 5)
    again.save()
    assert [row["step"] for row in written(table) if row.get("step")] == [*left, "5"]


def test_table_stays_where_a_run_is_killed_while_it_gets_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_at(tmp_path)
    table.log_metrics({"loss": 0.5}, 0)
    table.save()
    before = (tmp_path / "metrics.csv").read_text()
    monkeypatch.setattr("csv.DictWriter.writerows", lambda *_: pytest.fail("killed"))
    table.log_metrics({"test_loss": 0.5}, 0)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        table.save()
    assert (tmp_path / "metrics.csv").read_text() == before
