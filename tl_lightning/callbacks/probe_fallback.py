"""Reverting to the linear probe where fine-tuning has made the classifier worse."""

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

PROBE_FILE = "probe.ckpt"


class ProbeFallback(Callback):
    """Save the probe before the backbone trains, and revert to it if fine-tuning ends with a lower score.

    For linear probing followed by fine-tuning (https://arxiv.org/abs/2202.10054). The probe is the classifier at the
    last validation before the backbone trains. Its checkpoint ``probe.ckpt`` lies beside the others. A reverted
    classifier has its weights. ``last.ckpt`` still holds the fine-tuned weights, and ``best.ckpt`` the best epoch.

    Example:
        Python: ``Trainer(callbacks=[StagedUnfreezing({3: "layer4"}), ProbeFallback()])``.
        Command line: ``--trainer.callbacks+ ProbeFallback``, after the options of ``StagedUnfreezing``.

    Args:
        monitor: The validation score to compare.
        mode: Whether a higher or a lower score is better.

    Raises:
        ValueError: The mode is neither ``max`` nor ``min``.
    """

    def __init__(self, monitor: str = "val_accuracy", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; it must be 'max', where a higher {monitor} is better, or 'min'")
        self.monitor = monitor
        self.mode = mode
        self._reset()

    def _reset(self) -> None:
        self.probe_score: float | None = None
        self.last_score: float | None = None
        self.reverted = False
        self._probe_checked = False
        self._run_id = ""  # ties the probe's file to its run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run has a probe to revert to.

        Raises:
            ValueError: The backbone never trains, or trains from epoch 0, or nothing is validated, or the strategy
                shards the weights.
        """
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(  # noqa: TRY004 - the user has chosen a strategy that does not fit
                "ProbeFallback cannot restore the weights of the probe, which ModelParallelStrategy shards: use "
                "strategy 'ddp'"
            )
        self._reset()  # a reused callback knows the probe of its last run; a resumed run loads its own after this
        self._run_id = trainer.strategy.broadcast(uuid.uuid4().hex)
        if self._unfreezing_epoch(trainer, pl_module) in (None, 0):
            raise ValueError(
                "ProbeFallback needs epochs that train the head alone, and then epochs that train the backbone: add "
                "StagedUnfreezing, with a schedule whose first epoch is above 0"
            )
        if not trainer.limit_val_batches:
            raise ValueError(
                "ProbeFallback compares validation scores, but limit_val_batches is 0: set it above 0, or leave "
                "ProbeFallback out"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the score, and save the probe as long as the head trains alone.

        Raises:
            ValueError: The validation does not log the score.
        """
        if trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise ValueError(
                f"ProbeFallback compares {self.monitor!r}, which validation does not log: choose a monitor among "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        if trainer.sanity_checking:
            return
        first = self._unfreezing_epoch(trainer, pl_module)
        if first is not None and trainer.current_epoch < first and self.last_score is None:
            self.probe_score = float(score)
            # A whole checkpoint, because other callbacks change it: EMA puts the averaged weights in.
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
        else:
            self.last_score = float(score)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the probe is there when the backbone starts to train, and not only when the run ends.

        Raises:
            FileNotFoundError: The folder of the resumed run has lost the probe.
            ValueError: There was no validation before this stage, or the probe belongs to another run.
        """
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - StagedUnfreezing has checked this
        if not pl_module.freeze_policy.unfrozen or self._probe_checked:
            return
        if self.probe_score is None:
            raise ValueError(
                f"ProbeFallback has no probe: the backbone starts to train in epoch {trainer.current_epoch}, and there "
                "was no validation before it. Validate every epoch, or let the schedule start later"
            )
        self._read(trainer)
        self._probe_checked = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Revert to the probe if its score is better.

        Raises:
            FileNotFoundError: The probe is gone.
            ValueError: The probe belongs to another run, or is damaged.
        """
        if self.probe_score is None:
            return
        if self.last_score is None:
            rank_zero_warn("the run ended before fine-tuning was validated, so ProbeFallback has compared nothing")
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
            f"{compared}: reverted to the probe. Use {short_path(self.path(trainer))}; last.ckpt holds the fine-tuned "
            "weights. Next time, lower backbone_lr or train fewer stages"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the probe and of the last validation, the monitor, and the ID of the run."""
        scores = {"probe_score": self.probe_score, "last_score": self.last_score, "monitor": self.monitor}
        return scores | {"run": self._run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores and the ID of the resumed run.

        Raises:
            ValueError: The resumed run compared another score.
        """
        monitor = state_dict.get("monitor", self.monitor)
        if monitor != self.monitor:
            raise ValueError(
                f"ProbeFallback compares {self.monitor!r}, but the resumed run compared {monitor!r}: resume with "
                f"monitor={monitor!r}"
            )
        self.probe_score, self.last_score = state_dict["probe_score"], state_dict["last_score"]
        self._run_id = state_dict.get("run", self._run_id)

    def path(self, trainer: Trainer) -> Path:
        """Return the path of the probe's checkpoint: beside the other checkpoints of this run."""
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if folders:
            return Path(folders[-1]) / PROBE_FILE
        return Path(trainer.log_dir or trainer.default_root_dir) / PROBE_FILE

    def _read(self, trainer: Trainer) -> dict[str, Any]:
        path = self.path(trainer)
        advice = "copy it there from the folder of the resumed checkpoint, or leave ProbeFallback out"
        if not path.is_file():
            raise FileNotFoundError(
                f"ProbeFallback needs the probe of the resumed run, but {str(path)!r} does not exist: {advice}"
            )
        saved = checkpoints.read(path)
        if saved.get("callbacks", {}).get(self.state_key, {}).get("run") != self._run_id:
            raise ValueError(
                f"ProbeFallback needs the probe of the resumed run, but {str(path)!r} belongs to another run: {advice}"
            )
        return saved

    def _unfreezing_epoch(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        """Return the first epoch in which the backbone trains, or None."""
        assert isinstance(pl_module, TransferClassifier)  # noqa: S101 - StagedUnfreezing has checked this
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own list
            if isinstance(callback, StagedUnfreezing):
                epochs = (epoch for epoch, stage in callback.schedule.items() if pl_module.stages_from(stage))
                return next(epochs, None)
        return None
