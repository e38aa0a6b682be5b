"""The checkpoints that a run has where its user has chosen none."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tl_lightning.callbacks.probe_fallback import ProbeFallback
from tl_lightning.modules import TransferClassifier


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


def default_checkpoints(
    folder: Path | None, classifier: TransferClassifier, own: Sequence[Callback] = ()
) -> list[Callback]:
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
    names = {each.filename for each in ours} | {"probe" for each in own if isinstance(each, ProbeFallback)}
    for callback in theirs:
        beside = callback.dirpath is None or (place is not None and Path(callback.dirpath).absolute() == place)
        if beside and callback.filename in names:
            raise ValueError(
                f"a ModelCheckpoint is to write {callback.filename}.ckpt, which the run writes itself: give it another filename, or "
                "dirpath"
            )
    return [*ours]


def best_checkpoint_callback(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that keeps the best checkpoint: the first that goes by a score."""
    return next((callback for callback in _all(trainer) if callback.best_model_score is not None), None)


def reverted(trainer: Trainer) -> Path | None:
    """Return the checkpoint of the probe that stands in for what fine-tuning made of it; None if nothing does."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    fallbacks = (callback for callback in callbacks if isinstance(callback, ProbeFallback) and callback.reverted)
    return next((fallback.path(trainer) for fallback in fallbacks), None)


def newest_checkpoint_of(trainer: Trainer) -> Path | None:
    """Return the checkpoint that was written last, of those that a run goes on from; None if there is none yet."""
    whole = [each for each in _all(trainer) if not each.save_weights_only]
    paths = [Path(path) for each in whole for path in (each.best_model_path, each.last_model_path) if path]
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)


def _all(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
