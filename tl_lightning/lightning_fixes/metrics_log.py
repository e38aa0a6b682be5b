"""The table of a run's metrics, complete and without doubles however often the run is interrupted and resumed."""

import csv
import math
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class _Writer(ExperimentWriter):
    """Lightning's, which empties the table while it gives it a new column: a run that is killed then would lose it."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path))


class ResumableCSVLogger(CSVLogger):
    """Write ``metrics.csv``, and go on in that of the run that is resumed, which Lightning's logger would delete."""

    rows = 0
    """How many rows the run has logged, before it was interrupted too; a checkpoint knows, by :class:`CSVRowCount`."""
    steps: float = math.inf
    """How many steps of the optimizer lie behind the checkpoint that is resumed."""
    _before: Path | None = None
    _begun = False

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer of the table."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            table = Path(self.log_dir) / "metrics.csv"
            kept = table.with_name("metrics.csv.kept")
            if table.is_file():
                table.replace(kept)
            self._experiment = _Writer(self.log_dir)
            if kept.is_file():
                kept.replace(table)
                with table.open(newline="") as file:
                    self._experiment.metrics_keys = list(csv.DictReader(file).fieldnames or [])
                self._before = table
        there: ExperimentWriter = super().experiment
        return there

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Tensor | float], step: int | None = None) -> None:  # type: ignore[override]
        """Add a row; at first, drop what an interrupted run wrote that the run logs again."""
        _ = self.experiment
        if not self._begun and step is not None:
            self.rows = 0 if self._before is None else self._drop_after(self._before, step)
            self._begun = True
        super().log_metrics(metrics, step)
        self.rows += 1

    def _drop_after(self, table: Path, step: int) -> int:
        """Drop the rows from the step on that is logged now, and return how many are left.

        What was there when the checkpoint was written stays, since several rows may have the same step.
        """
        found = _read(table)

        def is_earlier(row: dict[str, str]) -> bool:
            at = row.get("step", "")
            return at.isdigit() and int(at) < min(step, self.steps)

        rows = found[: self.rows] + list(takewhile(is_earlier, found[self.rows :]))
        _write(table, self.experiment.metrics_keys, rows)
        return len(rows)


def _read(table: Path) -> list[dict[str, str]]:
    """Return the rows, but for one that a run was killed in; a value more than there are columns is left out."""
    lines = [line for line in table.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value or "" for name, value in row.items() if name} for row in csv.DictReader(lines)]


def _write(table: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replace a table as a whole."""
    part = table.with_name(f"{table.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(table)


class CSVRowCount(Callback):
    """Note in each checkpoint how many rows :class:`ResumableCSVLogger` has.

    A checkpoint from between two steps of the optimizer is taken back to the first, where the count is not needed: what was
    logged before it has other steps than what is logged after it. A validation that failed is run again.
    """

    def __init__(self) -> None:
        self._before_validation = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the count of before."""
        for table in _tables(trainer):
            self._before_validation = table.rows

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the rows, and the batches behind them."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        failed = trainer.validating and trainer.state.status == TrainerStatus.INTERRUPTED
        for table in _tables(trainer):
            table.save()  # else a run that is killed lacks rows that were counted
            checkpoint["metrics_table"] = {
                "batches": batches,
                "rows": self._before_validation if failed else table.rows,
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell the table, before it has its first row of the run that goes on."""
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        noted = checkpoint.get("metrics_table", {"batches": None})
        for table in _tables(trainer):
            table.rows = noted["rows"] if noted["batches"] == batches else 0
            table.steps = checkpoint["global_step"]


def _tables(trainer: Trainer) -> list[ResumableCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]
