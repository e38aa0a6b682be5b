"""Which of a run's checkpoints counts."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tl_lightning.callbacks.probe_fallback import ProbeFallback


def best_of(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that keeps the best checkpoint: the first that goes by a score."""
    return next((callback for callback in _all(trainer) if callback.best_model_score is not None), None)


def handed_back(trainer: Trainer) -> Path | None:
    """Return the checkpoint of the probe that stands in for what fine-tuning made of it; None if nothing does."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    fallbacks = (callback for callback in callbacks if isinstance(callback, ProbeFallback) and callback.handed_back)
    return next((fallback.path(trainer) for fallback in fallbacks), None)


def newest_of(trainer: Trainer) -> Path | None:
    """Return the checkpoint that was written last, of those that a run goes on from; None if there is none yet."""
    whole = [each for each in _all(trainer) if not each.save_weights_only]
    paths = [Path(path) for each in whole for path in (each.best_model_path, each.last_model_path) if path]
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)


def _all(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
