"""The metrics.csv of a run that was interrupted and resumed equals that of an uninterrupted run."""

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from tests.lightning_fixes.full_disk import limited_file_size
from tests.staged import classifier, images, trainer
from tl_lightning.lightning_fixes.metrics_log import CSVRowCount, ResumableCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore:.* directory .* exists and is not empty:UserWarning")

# An epoch of six batches then has two optimizer steps and three validations, two of them at the same step.
OFTEN: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 2}


class StoppedError(Exception):
    """Stop the run, as a signal would."""


class Stop(pl.Callback):
    """Stop at the start of a batch, counted from 0 over all epochs, or at the end of the validation after it."""

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
    """Run, or resume if there is a checkpoint, and return the rows of metrics.csv."""
    saves = ModelCheckpoint(folder, "saved", enable_version_counter=False, **moments)
    path = folder / "saved.ckpt"
    run = trainer(
        folder,
        *([] if stop is None else [Stop(stop, "save_on_exception" in moments)]),
        CSVRowCount(),
        saves,
        **{"max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 1} | options,
        logger=logger_at(folder),
    )
    with nullcontext() if stop is None else pytest.raises(StoppedError):
        run.fit(
            classifier(),
            images(photos, batch_size=4),
            ckpt_path=path if path.is_file() else None,
            weights_only=True,
        )
    return nonempty_values(folder / "metrics.csv")


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
def test_rows_of_a_resumed_run_are_those_of_an_uninterrupted_run(
    options: dict[str, Any], moments: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    whole = rows_of(tmp_path / "whole", photos, moments, **options)
    for stop in (7, 9, 11) if "save_on_exception" in moments else (8, 10, 12):
        rows_of(tmp_path / str(stop), photos, moments, stop=stop, **options)
        rows_of(tmp_path / str(stop), photos, moments, stop=15, **options)
        assert rows_of(tmp_path / str(stop), photos, moments, **options) == whole, f"stopped before batch {stop}"


def nonempty_values(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


class CountRows(pl.Callback):
    """Note, after each checkpoint, the number of rows in the checkpoint and the number of rows on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step:
            known = torch.load(self.folder / "saved.ckpt", weights_only=True)["metrics_table"]["rows"]
            self.counts.append((known, len(nonempty_values(self.folder / "metrics.csv"))))


def test_rows_that_a_checkpoint_counts_are_on_disk(photos: Path, tmp_path: Path) -> None:
    counts, logger = CountRows(tmp_path), logger_at(tmp_path)
    saves = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=1, enable_version_counter=False)
    rates = LearningRateMonitor("step")  # logs rows without writing them to disk
    options = {"max_epochs": 1, "enable_checkpointing": True, "log_every_n_steps": 1, "logger": logger}
    trainer(tmp_path, rates, saves, CSVRowCount(), counts, **options).fit(classifier(), images(photos, batch_size=4))
    assert [known for known, _ in counts.counts] == [1, 2, 3, 4, 5]
    assert all(there >= known for known, there in counts.counts)


def logger_at(folder: Path) -> ResumableCSVLogger:
    return ResumableCSVLogger(folder.parent, name="", version=folder.name)


@pytest.mark.parametrize(
    ("damage", "left"),
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
def test_damaged_table_keeps_its_whole_rows_when_a_run_resumes(damage: Any, left: str, tmp_path: Path) -> None:
    first = logger_at(tmp_path)
    for step in range(4):
        first.log_metrics({"value": 0.5 + step / 10}, step)
    first.save()
    table = tmp_path / "metrics.csv"
    table.write_text(damage(table.read_text()))
    again = logger_at(tmp_path)
    again.resumed_step = 3  # the fourth row came after the checkpoint, and is not logged again
    again.log_metrics({"value": 2.5}, 5)
    again.save()
    assert [row["step"] for row in nonempty_values(table) if row.get("step")] == [*left, "5"]


def test_table_survives_a_kill_while_a_column_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logger_at(tmp_path)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.save()
    before = (tmp_path / "metrics.csv").read_text()
    monkeypatch.setattr("csv.DictWriter.writerows", lambda *_: pytest.fail("killed"))
    logger.log_metrics({"test_loss": 0.5}, 0)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        logger.save()
    assert (tmp_path / "metrics.csv").read_text() == before


def test_full_disk_keeps_the_rows_from_before_and_half_a_row_never_stays(tmp_path: Path) -> None:
    logger = logger_at(tmp_path)
    for step in range(40):
        logger.log_metrics({"loss": 0.5}, step)
    logger.save()
    table = tmp_path / "metrics.csv"
    before = table.read_bytes()
    for step in range(40, 80):
        logger.log_metrics({"loss": 0.25}, step)
    with (
        limited_file_size(len(before) + 13),
        pytest.raises(OSError, match=r"metrics\.csv' cannot be written \(File too"),
    ):
        logger.save()
    assert table.read_bytes() == before
    logger.log_metrics({"test_loss": 0.5}, 80)  # a new column, for which the whole file is written again
    with (
        limited_file_size(len(before)),
        pytest.raises(OSError, match=r"^'.*metrics\.csv' cannot be written \(File too"),
    ):
        logger.save()
    assert table.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    logger.save()
    assert [row["step"] for row in nonempty_values(table)] == [str(step) for step in range(81)]
