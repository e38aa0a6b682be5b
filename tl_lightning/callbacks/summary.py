"""Say what came out of a run and where it lies."""

import shlex
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tl_lightning.callbacks.model_checkpoint import best_checkpoint_callback, newest_checkpoint_of, reverted
from tl_lightning.data import images_of
from tl_lightning.utils.console import print_table
from tl_lightning.utils.paths import short_path

_WORDS = {"val": "validation", "test": "test", "f1": "macro F1"}


class Summary(Callback):
    """Print the scores of a fit, a validation or a test, of which checkpoint, and where files lie, when the bar is gone."""

    def __init__(self) -> None:
        self._title = ""
        self._rows: dict[str, str] = {}
        self._begun = False
        self._fitted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something left to train."""
        self._begun = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit has come to its end."""
        self._fitted = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores of a validation that is no part of a fit."""
        if trainer.state.fn == "validate":
            self._note_scores(trainer, "validated", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores of the test."""
        self._note_scores(trainer, "tested", "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the predictions were made with."""
        self._title, self._rows = "predicted with", _checkpoint(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print what was noted."""
        if self._fitted:  # and all other callbacks have had their say
            self._note_fit(trainer)
        if self._rows:
            print_table(self._title, self._rows)
        self._rows = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how a fit goes on that Ctrl-C or SIGTERM, as of a cluster's scheduler, has interrupted."""
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)) or trainer.state.fn != "fit":
            return
        newest = newest_checkpoint_of(trainer)
        if newest is not None:
            print_table(
                "interrupted", {"go on with": f"the same command and --ckpt_path {shlex.quote(short_path(newest))}"}
            )
        else:
            print_table("interrupted", {"saved": "nothing yet: checkpoints are written after each epoch"})

    def _note_fit(self, trainer: Trainer) -> None:
        self._title, self._rows = "trained", {} if self._begun else _complete(trainer)
        if trainer.should_stop and trainer.current_epoch != trainer.max_epochs:
            last = trainer.current_epoch - 1
            stops = [callback for callback in trainer.early_stopping_callbacks if callback.stopped_epoch == last]
            by = "".join(f", as {callback.monitor} says" for callback in stops)
            self._rows["stopped early"] = f"in epoch {last}, counted from 0{by}"
        best, probe = best_checkpoint_callback(trainer), reverted(trainer)
        if probe is not None:
            self._rows["handed back"] = str(probe)
        elif best is not None and best.best_model_score is not None:
            self._rows[f"best {best.monitor}"] = f"{float(best.best_model_score):.4f}"
            self._rows["best model"] = best.best_model_path
        self._rows["outputs"] = str(trainer.log_dir)  # asks all ranks
        self._begun = self._fitted = False

    def _note_scores(self, trainer: Trainer, title: str, split: str) -> None:
        self._title, self._rows = title, _checkpoint(trainer)
        data = images_of(getattr(trainer, "datamodule", None))
        if data is not None:
            count, total = (f"{n:,}" for n in (len(data.splits[split].files), data.folder_index.num_images))
            self._rows["images"] = count
            if data.folder_index.is_drawn(split):
                self._rows["images"] += f" of {total}, drawn from the seed"
        for name, value in trainer.callback_metrics.items():
            if name.startswith(f"{split}_"):
                kind = name.removeprefix(f"{split}_")
                self._rows[f"{_WORDS[split]} {_WORDS.get(kind, kind)}"] = f"{float(value):.4f}"
        self._rows["outputs"] = str(trainer.log_dir)


def _checkpoint(trainer: Trainer) -> dict[str, str]:
    return {"checkpoint": str(Path(trainer.ckpt_path).absolute())} if trainer.ckpt_path else {}


def _complete(trainer: Trainer) -> dict[str, str]:
    """Say that a run that was resumed had ended before, and how it would go on."""
    epochs, steps = trainer.current_epoch, trainer.global_step
    if 0 <= trainer.max_steps <= steps:
        limit = f"--trainer.max_steps N, above {steps}"
    elif 0 <= (trainer.max_epochs or 0) <= epochs:
        limit = f"--trainer.max_epochs N, above {epochs}"
    else:
        return {}  # there are no batches
    return {"nothing left": "the run is complete", "go on with": f"the same command and {limit}"}
