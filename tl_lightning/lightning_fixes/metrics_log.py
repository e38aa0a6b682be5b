"""Keep ``metrics.csv`` complete and without duplicate rows, however often a run is interrupted and resumed.

``CSVLogger`` of Lightning has five faults:

- In a folder that has a ``metrics.csv``, as that of a resumed run, it deletes the file
  (https://github.com/Lightning-AI/pytorch-lightning/pull/19446).
- It empties the file while it adds a column, so that a run that is killed then loses all rows
  (https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/fabric/loggers/csv_logs.py,
  ``_rewrite_with_new_header``).
- On a full disk it leaves half a row, to which the next row is added.
- It writes in the encoding of the locale.
- It does not write the rows that a checkpoint counts, but waits for the 100th step or for ``save()``.

Needed for Lightning 2.6. This file can be deleted when ``CSVLogger`` continues an existing file, restores the number of
rows from the checkpoint, and replaces the file atomically.
"""

import csv
import io
import math
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tl_lightning.utils.files import write_atomically


class _AtomicWriter(ExperimentWriter):
    """Lightning's writer, but it writes UTF-8, replaces the file to add a column, and never leaves half a row."""

    _whole = 0  # bytes of complete rows

    def save(self) -> None:
        """Add the rows to the file, or leave it as it was.

        Raises:
            OSError: The rows cannot be written, as on a full disk; those from before are kept.
        """
        file = Path(self.metrics_file_path)
        self._whole = file.stat().st_size if file.is_file() else 0
        try:
            self._append_rows()
        except OSError as error:
            if error.strerror is None:
                raise  # write_atomically has named the file
            if file.is_file() and file.stat().st_size > self._whole:
                os.truncate(file, self._whole)
            failed = OSError(
                f"{str(file)!r} cannot be written ({error.strerror}); free some space, and resume the run "
                "(the rows from before are kept)"
            )
            failed.errno = error.errno
            raise failed from error

    def _append_rows(self) -> None:
        """Append the rows since the last call, as the method of Lightning does in the encoding of the locale."""
        if not self.metrics:
            return
        file = Path(self.metrics_file_path)
        if self._record_new_keys() and file.is_file():
            self._rewrite_with_new_header(self.metrics_keys)
        is_new = not file.is_file()
        with file.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, self.metrics_keys)
            if is_new:
                writer.writeheader()
            writer.writerows(self.metrics)
        self.metrics = []

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        _write_rows(file, fieldnames, _read_rows(file))
        self._whole = file.stat().st_size


class ResumableCSVLogger(CSVLogger):
    """Write ``metrics.csv``, and continue the file of a resumed run, which Lightning's logger would delete."""

    row_count = 0
    """Rows that the run has logged, before interruptions too; :class:`CSVRowCount` keeps it in checkpoints."""
    resumed_step: float = math.inf
    """Optimizer steps before the checkpoint from which the run resumes."""
    _continued: Path | None = None
    _has_logged = False

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            file = Path(self.log_dir) / "metrics.csv"
            kept = file.with_name("metrics.csv.kept")
            if file.is_file():
                file.replace(kept)  # out of the way of Lightning's writer, which deletes it
            self._experiment = _AtomicWriter(self.log_dir)
            if kept.is_file():
                kept.replace(file)
                with file.open(newline="", encoding="utf-8") as opened:
                    self._experiment.metrics_keys = list(csv.DictReader(opened).fieldnames or [])
                self._continued = file
        writer: ExperimentWriter = super().experiment
        return writer

    @rank_zero_only
    def log_metrics(  # type: ignore[override]
        self, metrics: dict[str, Tensor | float], step: int | None = None
    ) -> None:
        """Add a row; before the first one, drop the rows that an interrupted run wrote and this run logs again."""
        _ = self.experiment
        if not self._has_logged and step is not None:
            self.row_count = 0 if self._continued is None else self._drop_repeated_rows(self._continued, step)
            self._has_logged = True
        super().log_metrics(metrics, step)
        self.row_count += 1

    def _drop_repeated_rows(self, file: Path, step: int) -> int:
        """Drop the rows that are logged again from this step on, and return the number of rows left.

        The rows that the checkpoint counts are kept whatever their step is, since several rows may have the same step.
        """
        found = _read_rows(file)

        def is_earlier(row: dict[str, str]) -> bool:
            at = row.get("step", "")
            return at.isdigit() and int(at) < min(step, self.resumed_step)

        rows = found[: self.row_count] + list(takewhile(is_earlier, found[self.row_count :]))
        _write_rows(file, self.experiment.metrics_keys, rows)
        return len(rows)


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Read the rows, without an incomplete last line from a run that was killed, and without surplus values."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value or "" for name, value in row.items() if name} for row in csv.DictReader(lines)]


def _write_rows(file: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replace a file atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, lambda opened: opened.write(text.getvalue().encode()))


class CSVRowCount(Callback):
    """Note in each checkpoint how many rows :class:`ResumableCSVLogger` has written.

    A checkpoint from between two optimizer steps is rewound to the first of them, after which its count does not hold.
    There the steps suffice: rows logged before that step have other steps than rows logged after it. A validation that
    failed is run again, so its rows are not counted.
    """

    def __init__(self) -> None:
        self._rows_before_validation = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the count before the validation."""
        for logger in _csv_loggers(trainer):
            self._rows_before_validation = logger.row_count

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the rows to disk, and note their number and the number of batches."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        failed = trainer.validating and trainer.state.status == TrainerStatus.INTERRUPTED
        for logger in _csv_loggers(trainer):
            logger.save()  # otherwise, a killed run would lack rows that were counted
            checkpoint["metrics_table"] = {
                "batches": batches,
                "rows": self._rows_before_validation if failed else logger.row_count,
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the count, before the resumed run logs its first row."""
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        noted = checkpoint.get("metrics_table", {"batches": None})
        for logger in _csv_loggers(trainer):
            logger.row_count = noted["rows"] if noted["batches"] == batches else 0
            logger.resumed_step = checkpoint["global_step"]


def _csv_loggers(trainer: Trainer) -> list[ResumableCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]
