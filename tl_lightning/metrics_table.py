"""The table of a run's metrics, complete and without doubles however often the run is interrupted and resumed."""

import csv
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class MetricsTable(CSVLogger):
    """Write ``metrics.csv``, and go on in that of the run that is resumed, which Lightning's logger would delete."""

    rows = 0
    """How many rows the run has logged, before it was interrupted too; a checkpoint knows, by :class:`RowCount`."""
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
            made: ExperimentWriter = super().experiment
            if kept.is_file():
                kept.replace(table)
                with table.open(newline="") as file:
                    made.metrics_keys = list(csv.DictReader(file).fieldnames or [])
                self._before = table
            return made
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
        with table.open(newline="") as file:
            found = list(csv.DictReader(file))

        def is_earlier(row: dict[str, str | None]) -> bool:
            at = row.get("step") or ""
            return at.isdigit() and int(at) < step

        rows = found[: self.rows] + list(takewhile(is_earlier, found[self.rows :]))
        part = table.with_name("metrics.csv.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(table)
        return len(rows)


class RowCount(Callback):
    """Note in each checkpoint how many rows :class:`MetricsTable` has.

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


def _tables(trainer: Trainer) -> list[MetricsTable]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsTable)]
