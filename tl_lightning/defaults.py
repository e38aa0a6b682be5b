"""What a run has where its user has not chosen: precision, loggers, its configuration in a file."""

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def default_precision(accelerator: str) -> str:
    """Choose mixed precision on a CUDA device, bfloat16 where it is native, and single precision elsewhere."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def default_loggers(folder: Path) -> list[Logger]:
    """Build a CSV logger, and one for TensorBoard where that is installed, that write to one folder."""
    place: dict[str, Any] = {"save_dir": folder.parent, "name": "", "version": folder.name}
    loggers: list[Logger] = [MetricsTable(**place)]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(**place))
    return loggers


class MetricsTable(CSVLogger):
    """Write ``metrics.csv``, and go on in that of the run that is resumed, which Lightning's logger would delete."""

    _before: Path | None = None

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
        """Add a row; at first, drop what an interrupted run wrote after the checkpoint that is resumed."""
        _ = self.experiment
        if self._before is not None and step is not None:
            with self._before.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if str(row["step"]).isdigit() and int(row["step"]) < step]
            part = self._before.with_name("metrics.csv.part")
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.experiment.metrics_keys)
                writer.writeheader()
                writer.writerows(rows)
            part.replace(self._before)
            self._before = None
        super().log_metrics(metrics, step)


class SaveConfig(SaveConfigCallback):
    """Save the configuration once the run is known to be one, and without the checkpoint that it may go on from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        super().__init__(parser, config, *args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save now where nothing is resumed."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when model and data have accepted the checkpoint."""
        super().setup(trainer, pl_module, "fit")
