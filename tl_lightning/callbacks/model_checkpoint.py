"""The checkpoint callbacks of a run: ``best.ckpt`` and ``last.ckpt``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tl_lightning.callbacks.probe_fallback import ProbeFallback
from tl_lightning.modules import TransferClassifier


class RunCheckpoint(ModelCheckpoint):
    """Keep one checkpoint in the folder of a run, and find it again after the folder has moved.

    Args:
        dirpath: Folder of the checkpoint; None leaves it to the logger.
        filename: Name of the file, without ``.ckpt``.
        monitor: The validation score that the best epoch is chosen by; None keeps the latest epoch.
        mode: Whether a higher or a lower score is better.
    """

    def __init__(
        self, dirpath: Path | None, filename: str, monitor: str | None = None, mode: Literal["max", "min"] = "min"
    ) -> None:
        at_epoch_end = True if monitor is None else None
        super().__init__(
            dirpath, filename, monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=at_epoch_end
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, if the best checkpoint lies in the folder of this run."""
        state: dict[str, Any] = dict(state_dict)
        if self.dirpath is not None:
            best = state["best_model_path"]
            if self.monitor is not None and best and not Path(self._here(best)).is_file():
                rank_zero_warn(
                    f"the best checkpoint of the resumed run, {best!r}, is not in the folder of this run: the best "
                    "epoch is chosen anew, among those from now on"
                )
                return
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = self._here(state[key])
            state["best_k_models"] = {self._here(path): score for path, score in state["best_k_models"].items()}
            state["dirpath"] = self.dirpath
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath)) / Path(path).name) if path else path


class BestCheckpoint(RunCheckpoint):
    """Keep the best epoch by a score; among epochs of equal score, as is common with few images, by ``val_loss``."""

    _loss = float("inf")

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether this epoch is the best so far; an epoch whose loss or score is not finite never is."""
        validation_loss = trainer.callback_metrics.get("val_loss")
        if any(score is not None and not score.isfinite() for score in (current, validation_loss)):
            return False
        better = super().check_monitor_top_k(trainer, current)
        loss = float("inf") if validation_loss is None else float(validation_loss)
        if not better and current is not None and self.best_model_score is not None:
            tied = bool(current == self.best_model_score) and loss < self._loss
            better = trainer.strategy.reduce_boolean_decision(tied)
        if better:
            self._loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and its loss."""
        return super().state_dict() | {"loss": self._loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and its loss."""
        super().load_state_dict(state_dict)
        if self.best_model_score is not None:
            self._loss = state_dict["loss"]


def default_checkpoints(
    folder: Path | None, classifier: TransferClassifier, own: Sequence[Callback] = ()
) -> list[Callback]:
    """Build the callbacks for ``best.ckpt``, chosen on validation, and ``last.ckpt``, saved after every epoch.

    The best epoch has the highest macro F1, or the lowest loss where a subclass measures no F1. These are two
    callbacks, because Lightning's ``save_last`` saves only when the monitored score has improved.

    Args:
        folder: Folder of the run; None leaves it to the logger.
        classifier: The classifier to train.
        own: The user's callbacks; a ``ModelCheckpoint`` with a monitor replaces ``best.ckpt``.

    Raises:
        ValueError: A ``ModelCheckpoint`` of the user writes a file of the same name.
    """
    place = None if folder is None else folder / "checkpoints"
    has_f1 = "f1" in classifier.val_metrics  # the names there have no prefix
    best = (
        BestCheckpoint(place, "best", "val_f1", "max") if has_f1 else BestCheckpoint(place, "best", "val_loss", "min")
    )
    last = RunCheckpoint(place, "last")
    theirs = [callback for callback in own if isinstance(callback, ModelCheckpoint)]
    ours: list[RunCheckpoint] = [last] if any(callback.monitor for callback in theirs) else [best, last]
    names = {callback.filename for callback in ours}
    names |= {"probe" for callback in own if isinstance(callback, ProbeFallback)}
    for callback in theirs:
        beside = callback.dirpath is None or (place is not None and Path(callback.dirpath).absolute() == place)
        if beside and callback.filename in names:
            raise ValueError(
                f"a ModelCheckpoint writes {callback.filename}.ckpt, which the run writes too: give it another "
                "filename or dirpath"
            )
    return [*ours]


def best_checkpoint_callback(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the first checkpoint callback with a best score, or None."""
    return next((callback for callback in _model_checkpoints(trainer) if callback.best_model_score is not None), None)


def reverted(trainer: Trainer) -> Path | None:
    """Return the checkpoint of the probe that the classifier was reverted to, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    fallbacks = (callback for callback in callbacks if isinstance(callback, ProbeFallback) and callback.reverted)
    return next((fallback.path(trainer) for fallback in fallbacks), None)


def newest_checkpoint_of(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint that the run can be resumed from, or None if there is none yet."""
    resumable = [callback for callback in _model_checkpoints(trainer) if not callback.save_weights_only]
    paths = [Path(path) for each in resumable for path in (each.best_model_path, each.last_model_path) if path]
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
