"""Move each checkpoint to the last optimizer step, so that a resumed run ends with the same bits.

Lightning saves in the middle of a batch, of an accumulation (without its gradients) or before a validation. On resume
it skips or repeats batches, validations and the end of an epoch
(https://github.com/Lightning-AI/pytorch-lightning/issues/19549). Needed for Lightning 2.6 (loops/fit_loop.py,
loops/training_epoch_loop.py). This file can be deleted when a run resumed from any of these moments ends like an
uninterrupted one; tests/test_resume.py shows that.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tl_lightning.freezing import FreezePolicy
from tl_lightning.lightning_fixes.mean_loss import MeanLoss


class StepBoundary:
    """Rewind a checkpoint to the last optimizer step: a resumed run sees the batches since that step again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._loss = torch.zeros(2)
        self._trained: frozenset[str] | None = None
        self._changing: dict[str, tuple[nn.Module, str]] = {}
        self._resumed_losses: list[list[float]] = []
        self._validation_is_due = False
        self._batch = (-1, -1)  # the current batch: its number in the epoch from 1, and the optimizer steps before it

    # While training ---------------------------------------------------------------------------------------------------

    def snapshot(self, trainer: Trainer, module: LightningModule, freeze_policy: FreezePolicy, loss: MeanLoss) -> None:
        """Copy, before the first batch of a step, the buffers that a forward pass changes.

        Args:
            trainer: The trainer, at the start of a batch.
            module: The trained module.
            freeze_policy: Tells which buffers are frozen.
            loss: The loss of the epoch so far.
        """
        number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._batch = (number, trainer.global_step)
        if freeze_policy.unfrozen != self._trained:
            frozen = {f"backbone.{name}" for name in freeze_policy.frozen_tensors()}
            self._changing = {name: _owner(module, name) for name, _ in module.named_buffers() if name not in frozen}
            self._trained = freeze_policy.unfrozen
        if (number - 1) % trainer.accumulate_grad_batches == 0:
            self._buffers = {name: getattr(owner, leaf).clone() for name, (owner, leaf) in self._changing.items()}
            self._loss = loss.sums

    def rewind(self, trainer: Trainer, checkpoint: dict[str, Any], loss: MeanLoss) -> Tensor:
        """Rewind the buffers and the place in the data of a checkpoint that is taken between two optimizer steps.

        Args:
            trainer: The trainer that saves.
            checkpoint: The checkpoint, which is changed.
            loss: The loss of the epoch so far.

        Returns:
            The sums of the epoch's loss (2,) at that step.
        """
        epoch_loop = trainer.fit_loop.epoch_loop
        now = epoch_loop.batch_progress.current
        every = trainer.accumulate_grad_batches
        within = now.ready > now.processed  # type: ignore[attr-defined]  # the progress of a batch has it
        begun = within and self._batch[0] == now.ready
        if within and not (begun and trainer.global_step > self._batch[1]):
            extra = (now.ready - 1) % every + 1
        elif within or now.ready >= trainer.num_training_batches or epoch_loop.batch_progress.is_last_batch:
            extra = 0  # Lightning steps on the last batch of an epoch
        else:
            extra = now.ready % every
        fit = checkpoint["loops"]["fit_loop"]
        _reopen_epoch(trainer, fit, now.ready)
        progress = fit["epoch_loop.batch_progress"]
        if extra == 0 and not within:
            if _is_within_validation(trainer):
                for counts in (progress["current"], progress["total"]):
                    counts["completed"] = counts["processed"] - 1  # marks the validation as due
            return loss.sums
        sums = loss.sums
        if extra > 0 and (begun or extra > 1 or not within):
            for key in ("state_dict", "current_model_state"):  # EMA saves the live weights as current_model_state
                state = checkpoint.get(key, {})
                state.update({name: buffer for name, buffer in self._buffers.items() if name in state})
            sums = self._loss
        _move_back(trainer, checkpoint, extra)
        return sums

    # When a run is resumed --------------------------------------------------------------------------------------------

    def load_state(self, checkpoint: dict[str, Any], losses: list[list[float]]) -> None:
        """Correct the progress counts of a checkpoint before Lightning restores them.

        - At the end of a batch, the validation that may follow is due, and so may be the end of the epoch. Lightning
          skips both. Here the batch counts as complete, and :meth:`resume` catches up.
        - At the very start of an epoch, Lightning would end it at once. Here the checkpoint counts as the end of the
          epoch before.

        Args:
            checkpoint: The checkpoint, which is changed.
            losses: The sums of the epoch's loss, by rank.
        """
        fit = checkpoint["loops"]["fit_loop"]
        epochs, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
        if epochs["ready"] > epochs["started"]:
            for counts in fit["epoch_progress"].values():
                counts["ready"] = counts["started"]
        self._resumed_losses = losses if epochs["processed"] < epochs["started"] else []
        self._validation_is_due = batches["current"]["completed"] == batches["current"]["processed"] - 1
        if self._validation_is_due:
            for counts in (batches["current"], batches["total"]):
                counts["completed"] = counts["processed"]

    def resume(self, trainer: Trainer, loss: MeanLoss) -> bool:
        """Start an epoch, or continue the resumed one.

        Returns:
            Whether the resumed epoch has no batch left.
        """
        loss.reset()
        self._trained, self._batch = None, (-1, -1)  # parts may have been replaced since an earlier fit
        is_resumed, ranks = bool(self._resumed_losses), len(self._resumed_losses)
        if trainer.global_rank < ranks:
            loss.load_sums(torch.tensor(self._resumed_losses[trainer.global_rank]))
        if is_resumed and ranks != trainer.world_size:
            rank_zero_warn(
                "the checkpoint was saved by one process that failed alone, so train_loss of this epoch covers only "
                "its batches; weights and all else are exact"
            )
        if self._validation_is_due:
            catch_up(trainer)
        _correct_logged_step(trainer)
        self._resumed_losses, self._validation_is_due = [], False
        return is_resumed and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def catch_up(trainer: Trainer) -> None:
    """Run the validation that is due after the last batch before the checkpoint, or else end the epoch."""
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None  # noqa: S101 - training has started
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop.val_loop.restarting = False  # it has not started
        loop.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
    else:
        loop.val_loop._has_run = True  # otherwise Lightning trains on where the loader has more batches than the epoch


def _correct_logged_step(trainer: Trainer) -> None:
    """Set the step by which scores are logged, which Lightning saves before it counts the last optimizer step."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if trainer.lightning_module.automatic_optimization and fetcher is not None:
        validates_first = loop.restarting and loop._should_check_val_fx(fetcher) and not loop._should_accumulate()
        loop._batches_that_stepped = trainer.global_step - validates_first


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Move a checkpoint from the end of an epoch to the start of the next one, for a run that ends by ``max_steps``.

    Lightning does so only where a run ends by ``max_epochs``. Otherwise it starts the next epoch under the number of
    the previous one, with its data (loops/fit_loop.py, ``_iteration_based_training``).
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]
    now = epochs["current"]
    if not now["ready"] == now["started"] == now["processed"]:
        return
    for counts in (epochs["current"], epochs["total"]):
        counts["completed"] = counts["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    batches["total"]["completed"] = batches["total"]["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)


def _reopen_epoch(trainer: Trainer, fit: dict[str, Any], ready: int) -> None:
    """Mark an epoch as unfinished that a limit of steps or time has cut short."""
    current = fit["epoch_progress"]["current"]
    ended = current["ready"] == current["processed"]
    if ended and ready > 0 and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
        for counts in fit["epoch_progress"].values():
            counts["processed"] = counts["started"] - 1
            counts["completed"] = min(counts["completed"], counts["processed"])


def _move_back(trainer: Trainer, checkpoint: dict[str, Any], batches: int) -> None:
    """Move the place in the data of a checkpoint back by a number of batches."""
    fit = checkpoint["loops"]["fit_loop"]
    progress = fit["epoch_loop.batch_progress"]
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(counts, counts["ready"] - batches))
    progress["is_last_batch"] = progress["is_last_batch"] and batches == 0
    place = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__, {}).get("place")
    for state in (place, *fit["state_dict"].get("combined_loader", ())):  # Lightning saves the loader's place as well
        if isinstance(state, dict) and "batches" in state:
            state["batches"] -= batches


def _is_within_validation(trainer: Trainer) -> bool:
    if not trainer.validating:
        return False
    loop = trainer.fit_loop.epoch_loop.val_loop
    batches_left = loop.batch_progress.current.completed < sum(loop.max_batches)
    return batches_left or trainer.state.status == TrainerStatus.INTERRUPTED


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
