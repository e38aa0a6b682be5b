"""Do not let fine-tuning end below the probe that it began with."""

import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tl_lightning.callbacks.staged_unfreezing import StagedUnfreezing
from tl_lightning.modules import TransferClassifier
from tl_lightning.modules import checkpoint as checkpoints
from tl_lightning.utils.paths import short_path

FILE = "probe.ckpt"


class ProbeFallback(Callback):
    """Keep the probe when the backbone begins to train, and hand its weights back if fine-tuning ends below it.

    For linear probing, then fine-tuning (https://arxiv.org/abs/2202.10054) with :class:`StagedUnfreezing`. The probe, as
    it was at the last validation before the backbone trained, is saved as ``probe.ckpt`` beside the other checkpoints, a
    whole classifier like them; what is handed back is this file, and the classifier in memory. ``last.ckpt`` remains what
    training ended with, and ``best.ckpt`` the best epoch of all.

    Args:
        monitor: The score on validation that decides.
        mode: Whether more of it is better, or less.

    Raises:
        ValueError: The mode is neither ``max`` nor ``min``.
    """

    def __init__(self, monitor: str = "val_accuracy", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; it is 'max' where more of {monitor} is better, else 'min'")
        self.monitor = monitor
        self.mode = mode
        self._forget()

    def _forget(self) -> None:
        self.probe_score: float | None = None
        self.last_score: float | None = None
        self.reverted = False
        self._found = False  # the probe that a stage falls back on
        self._run = ""  # by which a run knows its probe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there is a probe to fall back on.

        Raises:
            ValueError: Nothing is unfrozen, or the backbone trains from the start, or nothing is validated, or the strategy
                shards the weights.
        """
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
                "ModelParallelStrategy shards the weights, so those of the probe cannot be put back: use strategy 'ddp'"
            )
        self._forget()  # the probe of another run; that of a resumed one is loaded after this
        self._run = trainer.strategy.broadcast(uuid.uuid4().hex)
        if self._first_epoch(trainer, pl_module) in (None, 0):
            raise ValueError(
                "ProbeFallback needs epochs in which the head trains alone, and others after them: add StagedUnfreezing, with "
                "a schedule whose first epoch is above 0"
            )
        if not trainer.limit_val_batches:
            raise ValueError("ProbeFallback compares scores on validation, and limit_val_batches is 0")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the probe of the run that is resumed along into another folder."""
        path = self.path(trainer)
        beside = Path(trainer.ckpt_path).with_name(FILE) if trainer.ckpt_path else path
        if trainer.is_global_zero and self.probe_score is not None and not path.is_file() and beside.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(beside, path)
        trainer.strategy.barrier("probe")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the score, and save the probe while the head trains alone.

        Raises:
            ValueError: There is no such score on validation.
        """
        if trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise ValueError(
                f"ProbeFallback compares {self.monitor!r}, which validation does not log; there are "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        if trainer.sanity_checking:
            return
        first = self._first_epoch(trainer, pl_module)
        if first is not None and trainer.current_epoch < first and self.last_score is None:
            self.probe_score = float(score)
            # Not the weights alone, for callbacks have a say in a whole checkpoint, as one that averages the weights.
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
        else:
            self.last_score = float(score)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make sure that the probe is there when the backbone trains: now, not when the run has ended.

        Raises:
            ValueError: The run that is resumed was not validated before this stage, or its folder has lost the probe.
        """
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - StagedUnfreezing has made sure
        if not pl_module.freeze_policy.trained or self._found:
            return
        if self.probe_score is None:
            raise ValueError(
                f"the backbone begins to train in epoch {trainer.current_epoch}, and there was no validation before it, so "
                "ProbeFallback has no probe: validate every epoch, or let a later epoch be the first of the schedule"
            )
        self._read(trainer)
        self._found = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the probe's weights back where that is better."""
        if self.probe_score is None:
            return
        if self.last_score is None:
            rank_zero_warn(
                "the run ended before fine-tuning was validated, so there is nothing to compare with the probe"
            )
            return
        saved, score = self._read(trainer), self.last_score
        probe = float(saved["callbacks"][self.state_key]["probe_score"])
        compared = f"fine-tuning ended with {self.monitor} {score:.4f}, the probe had {probe:.4f}"
        if score >= probe if self.mode == "max" else score <= probe:
            rank_zero_info(f"{compared}: the fine-tuned weights stay")
            return
        pl_module.load_state_dict(saved["state_dict"])
        self.reverted = True
        rank_zero_warn(
            f"{compared}: the probe's weights are handed back. Use {short_path(self.path(trainer))}; last.ckpt is what fine-tuning ended "
            "with. Lower backbone_lr or train fewer stages"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the probe scored, what fine-tuning scored last, and by what."""
        scores = {"probe_score": self.probe_score, "last_score": self.last_score, "monitor": self.monitor}
        return scores | {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the probe of the run that is resumed.

        Raises:
            ValueError: It was compared by another score.
        """
        monitor = state_dict.get("monitor", self.monitor)
        if monitor != self.monitor:
            raise ValueError(
                f"ProbeFallback compares {self.monitor!r}, and the run that is resumed compared {monitor!r}: resume with that"
            )
        self.probe_score, self.last_score = state_dict["probe_score"], state_dict["last_score"]
        self._run = state_dict.get("run", self._run)

    def _read(self, trainer: Trainer) -> dict[str, Any]:
        """Return the probe's checkpoint, of this run."""
        path = self.path(trainer)
        out = "put it there, or leave ProbeFallback out"
        if not path.is_file():
            raise FileNotFoundError(
                f"ProbeFallback needs the probe of the run that is resumed, and {str(path)!r} does not exist: {out}"
            )
        saved = checkpoints.read(path)
        if saved.get("callbacks", {}).get(self.state_key, {}).get("run") != self._run:
            raise ValueError(
                f"ProbeFallback needs the probe of the run that is resumed, and {str(path)!r} is that of another run: {out}"
            )
        return saved

    def path(self, trainer: Trainer) -> Path:
        """Return where the probe lies: beside the last checkpoints, wherever the run's folder is now."""
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if folders:
            return Path(folders[-1]) / FILE
        return Path(trainer.log_dir or trainer.default_root_dir) / FILE

    def _first_epoch(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - StagedUnfreezing has made sure
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
            if isinstance(callback, StagedUnfreezing):
                epochs = (e for e, stage in callback.schedule.items() if pl_module.stages_from(stage))
                return next(epochs, None)
        return None
