"""What a run has where its user has not chosen: a folder, checkpoints, precision, loggers."""

import csv
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tl_lightning.modules import TransferClassifier, checkpoint


def claim_folder(root: Path) -> Path:
    """Make the folder ``version_N`` of a new run, which no other run has, and return its absolute path.

    Raises:
        NotADirectoryError: The root is a file.
    """
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"trainer.default_root_dir is {str(root)!r}, a file; give a folder for the runs")
    while True:
        taken = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdigit()]
        folder = root.absolute() / f"version_{max(taken, default=-1) + 1}"
        if getattr(rank_zero_only, "rank", 0) != 0:
            return folder  # only the first process writes
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue  # another run was faster
        return folder


_WITHOUT_RESULTS = re.compile(
    r"config\.yaml|hparams\.yaml|metrics\.csv|predictions\.csv\.part|events\.out\.tfevents\..*"
)


def give_back_folder(folder: Path) -> None:
    """Remove the folder of a run that ended before it began, unless something else has been put there."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if getattr(rank_zero_only, "rank", 0) != 0 or not all(_WITHOUT_RESULTS.fullmatch(path.name) for path in found):
        return
    for path in found:
        path.unlink()
    with suppress(OSError):  # somebody else was faster, or has just put something there
        folder.rmdir()


def find_checkpoint(root: Path, name: Literal["best", "last"]) -> Path:
    """Return the checkpoint of that name of the newest run that has one.

    Raises:
        FileNotFoundError: No run has one.
    """
    found = [file for file in root.glob(f"version_*/checkpoints/{name}.ckpt") if file.parts[-3][8:].isdigit()]
    if not found:
        raise FileNotFoundError(f"no run in {str(root.absolute())!r} has a {name}.ckpt; give the path of a checkpoint")
    return max(found, key=lambda file: int(file.parts[-3][8:]))


def newest_checkpoint(root: Path) -> Path:
    """Return the checkpoint that a run goes on from: what the newest run that has one wrote last, and whole.

    Raises:
        FileNotFoundError: No run has one.
    """
    runs = [run for run in root.glob("version_*") if run.name[8:].isdigit()]
    for run in sorted(runs, key=lambda run: int(run.name[8:]), reverse=True):
        files = (file for file in run.glob("checkpoints/*.ckpt") if file.name not in ("best.ckpt", "probe.ckpt"))
        second = None
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
            with suppress(ValueError):  # cut short, when the run was killed
                saved = checkpoint.read(file)
                if saved.get("optimizer_states") and not _lacks_validation(saved["loops"]["fit_loop"]):
                    return file
                second = second or (file if saved.get("optimizer_states") else None)
        if second is not None:
            return second
    raise FileNotFoundError(f"no run in {str(root.absolute())!r} can be gone on with; give the path of a checkpoint")


def _lacks_validation(progress: dict[str, Any]) -> bool:
    """Return whether a checkpoint lies between an epoch's last batch and its end: Lightning would go on without the validation."""
    epochs = progress["epoch_progress"]["current"]
    return bool(progress["epoch_loop.batch_progress"]["is_last_batch"] and epochs["processed"] < epochs["started"])


class RunCheckpoint(ModelCheckpoint):
    """Keep one checkpoint in the folder of a run, and know it again where the folder was moved.

    Args:
        dirpath: Folder of the checkpoint; None leaves it to the logger.
        filename: Its name, without ``.ckpt``.
        monitor: The score on validation that it is the best of; None for the latest.
        mode: Whether more of it is better, or less.
    """

    def __init__(
        self, dirpath: Path | None, filename: str, monitor: str | None = None, mode: Literal["max", "min"] = "min"
    ) -> None:
        at_epoch_end = True if monitor is None else None
        super().__init__(
            dirpath, filename, monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=at_epoch_end
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score, and where the run goes on in another folder, the file that has it."""
        moved: dict[str, Any] = dict(state_dict)
        if self.dirpath is not None:
            before, here = Path(moved["best_model_path"]), Path(self._here(moved["best_model_path"]))
            if self.monitor is not None and moved["best_model_path"] and not here.is_file():
                if not before.is_file():
                    return  # the file is lost, so the best one is sought anew
                if getattr(rank_zero_only, "rank", 0) == 0:
                    here.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(before, here)
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                moved[key] = self._here(moved[key])
            moved["best_k_models"] = {self._here(path): score for path, score in moved["best_k_models"].items()}
            moved["dirpath"] = self.dirpath
        super().load_state_dict(moved)

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath)) / Path(path).name) if path else path


class BestCheckpoint(RunCheckpoint):
    """Keep the best epoch: by a score, and where scores are equal, as they often are on few images, by the loss."""

    _loss = float("inf")

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether this epoch is to be saved."""
        better = super().check_monitor_top_k(trainer, current)
        loss = float(trainer.callback_metrics.get("val_loss", float("inf")))
        if not better and current is not None and self.best_model_score is not None:
            tied = bool(current == self.best_model_score) and loss < self._loss
            better = trainer.strategy.reduce_boolean_decision(tied)
        if better:
            self._loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and what belongs to it."""
        return super().state_dict() | {"loss": self._loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score, and its loss."""
        super().load_state_dict(state_dict)
        self._loss = state_dict["loss"]


def best_and_last(folder: Path | None, classifier: TransferClassifier, own: Sequence[Callback] = ()) -> list[Callback]:
    """Build the checkpoint callbacks: ``best.ckpt`` by validation, ``last.ckpt`` after every epoch.

    The best epoch is that of the highest macro F1, or of the lowest loss where a subclass measures no F1. They are two
    callbacks, since Lightning's ``save_last`` saves only when the monitored score has improved.

    Args:
        folder: Of the run; None leaves it to the logger.
        classifier: What is trained.
        own: The user's callbacks; a checkpoint of theirs that goes by a score takes the place of ``best.ckpt``.

    Raises:
        ValueError: One of theirs has the name of one of ours.
    """
    place = None if folder is None else folder / "checkpoints"
    scored = "f1" in classifier.val_metrics  # by its name without "val_"
    best = (
        BestCheckpoint(place, "best", "val_f1", "max") if scored else BestCheckpoint(place, "best", "val_loss", "min")
    )
    last = RunCheckpoint(place, "last")
    theirs = [callback for callback in own if isinstance(callback, ModelCheckpoint)]
    ours: list[RunCheckpoint] = [last] if any(callback.monitor for callback in theirs) else [best, last]
    for callback in theirs:
        beside = callback.dirpath is None or (place is not None and Path(callback.dirpath).absolute() == place)
        if beside and callback.filename in {each.filename for each in ours}:
            raise ValueError(
                f"a ModelCheckpoint is to write {callback.filename}.ckpt, which the run writes itself: give it another filename, or "
                "dirpath"
            )
    return [*ours]


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
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
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
