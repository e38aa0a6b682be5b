"""The summary of a run, printed at its end."""

import shlex
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tl_lightning.callbacks.model_checkpoint import best_checkpoint_callback, newest_checkpoint_of, reverted
from tl_lightning.data import images_of
from tl_lightning.data.splits import describe_missing_classes
from tl_lightning.utils.console import print_table
from tl_lightning.utils.paths import short_path

_LONG_NAMES = {"val": "validation", "test": "test", "f1": "macro F1"}


class Summary(Callback):
    """Print the scores of a fit, validation or test, and the paths of its checkpoint and outputs.

    An interrupted fit prints how to resume it.

    Example:
        Python: ``Trainer(callbacks=[Summary()])``; put it after the progress bar.
        The command line always adds it.
    """

    def __init__(self) -> None:
        self._title = ""
        self._rows: dict[str, str] = {}
        self._training_started = False
        self._fit_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the run was not complete before."""
        self._training_started = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit was not interrupted."""
        self._fit_ended = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores of a validation outside a fit."""
        if trainer.state.fn == "validate":
            self._note_scores(trainer, "validated", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores of a test."""
        self._note_scores(trainer, "tested", "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the checkpoint of the predictions."""
        self._title, self._rows = "predicted with", _checkpoint(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary."""
        if self._fit_ended:  # now all callbacks have ended the fit, ProbeFallback included
            self._note_fit(trainer)
        if self._rows:
            print_table(self._title, self._rows)
        self._rows = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print how to resume a fit that was interrupted by Ctrl-C, or by SIGTERM from a cluster's scheduler."""
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)) or trainer.state.fn != "fit":
            return
        newest = newest_checkpoint_of(trainer)
        if newest is not None:
            resume = f"the same command and --ckpt_path {shlex.quote(short_path(newest))}"
            print_table("interrupted", {"resume with": resume})
        else:
            print_table("interrupted", {"saved": "nothing yet: checkpoints are written after each epoch"})

    def _note_fit(self, trainer: Trainer) -> None:
        self._title, self._rows = "trained", {} if self._training_started else _complete(trainer)
        if trainer.should_stop and trainer.current_epoch != trainer.max_epochs:
            last = trainer.current_epoch - 1
            stopping = [callback for callback in trainer.early_stopping_callbacks if callback.stopped_epoch == last]
            reason = "".join(f", by early stopping on {callback.monitor}" for callback in stopping)
            self._rows["stopped early"] = f"in epoch {last}, counted from 0{reason}"
        best, probe = best_checkpoint_callback(trainer), reverted(trainer)
        if probe is not None:
            self._rows["reverted to"] = str(probe)
        elif best is not None and best.best_model_score is not None:
            self._rows[f"best {best.monitor}"] = f"{float(best.best_model_score):.4f}"
            self._rows["best model"] = best.best_model_path
        self._note_missing_classes(trainer, "val")
        self._rows["outputs"] = _outputs(trainer)
        self._training_started = self._fit_ended = False

    def _note_missing_classes(self, trainer: Trainer, split: str) -> None:
        data = images_of(getattr(trainer, "datamodule", None))
        if data is not None:
            missing = describe_missing_classes(split, data.splits[split], data.class_names)
            self._rows |= {"not scored": missing} if missing else {}

    def _note_scores(self, trainer: Trainer, title: str, split: str) -> None:
        self._title, self._rows = title, _checkpoint(trainer)
        data = images_of(getattr(trainer, "datamodule", None))
        if data is not None:
            count, total = (f"{n:,}" for n in (len(data.splits[split].files), data.folder_index.num_images))
            self._rows["images"] = count
            if data.folder_index.is_random_split(split):
                self._rows["images"] += f" of {total}, drawn by the seed"
        self._note_missing_classes(trainer, split)
        for name, value in trainer.callback_metrics.items():
            if name.startswith(f"{split}_"):
                kind = name.removeprefix(f"{split}_")
                self._rows[f"{_LONG_NAMES[split]} {_LONG_NAMES.get(kind, kind)}"] = f"{float(value):.4f}"
        self._rows["outputs"] = _outputs(trainer)


def _checkpoint(trainer: Trainer) -> dict[str, str]:
    return {"checkpoint": str(Path(trainer.ckpt_path).absolute())} if trainer.ckpt_path else {}


def _outputs(trainer: Trainer) -> str:
    """Return the folder of the outputs; all ranks must call this."""
    folder = trainer.log_dir  # a collective operation
    is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it
    return "nothing was written, since trainer.fast_dev_run only tries the configuration" if is_trial else str(folder)


def _complete(trainer: Trainer) -> dict[str, str]:
    """Return the rows for a resumed run that was complete before: how to train longer."""
    epochs, steps = trainer.current_epoch, trainer.global_step
    if 0 <= trainer.max_steps <= steps:
        limit = f"--trainer.max_steps N, above {steps}"
    elif 0 <= (trainer.max_epochs or 0) <= epochs:
        limit = f"--trainer.max_epochs N, above {epochs}"
    else:
        return {}  # the data have no batches
    return {"nothing left": "the run is complete", "resume with": f"the same command and {limit}"}
