"""Checkpoints lie at optimizer steps: one that is asked for between them goes back to the last."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from tl_lightning.freezing import FreezePolicy
from tl_lightning.lightning_fixes.mean_loss import MeanLoss


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Take a checkpoint from the end of an epoch to the start of the next one, for a run that ends by ``max_steps``.

    Lightning does so itself where a run ends by ``max_epochs`` alone; otherwise it would begin the next epoch under the
    number of the one before, and so with its data (lightning.pytorch.loops.fit_loop, ``_iteration_based_training``).
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


def catch_up(trainer: Trainer) -> None:
    """Do what follows on the batch that a resumed run begins behind: a validation, if one is due, or the epoch's end."""
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None  # noqa: S101 - training has begun
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop.val_loop.restarting = False  # it has not begun
        loop.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
    else:
        loop.val_loop._has_run = True  # else Lightning trains on, where the loader has more than the epoch takes


def count_steps(trainer: Trainer, *, starts: bool = False) -> None:
    """Let scores be logged by the steps behind them, as in an uninterrupted run; Lightning counts one more, or one less.

    A batch counts when the validation that follows it is done, or has been skipped since the run was resumed behind it.

    Args:
        trainer: In a fit.
        starts: The run starts, or is resumed.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if trainer.lightning_module.automatic_optimization and not trainer.sanity_checking and fetcher is not None:
        follows = trainer.validating or (starts and loop.restarting and loop._should_check_val_fx(fetcher))
        loop._batches_that_stepped = trainer.global_step - (follows and not loop._should_accumulate())


def _is_amid_validation(trainer: Trainer) -> bool:
    if not trainer.validating:
        return False
    loop = trainer.fit_loop.epoch_loop.val_loop
    left = loop.batch_progress.current.completed < sum(loop.max_batches)
    return left or trainer.state.status == TrainerStatus.INTERRUPTED  # by what then follows


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


class StepBoundary:
    """Take a checkpoint back to the optimizer's last step, since neither half a batch nor accumulated gradients are saved.

    A resumed run then sees the batches since that step again, and ends with the bits of the uninterrupted one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._loss = torch.zeros(2)
        self._trained: frozenset[str] | None = None
        self._moving: dict[str, tuple[nn.Module, str]] = {}
        self._so_far: list[list[float]] = []
        self._behind_a_batch = False
        self._batch = (-1, -1)  # of the batch at hand: its number in the epoch, from 1, and the steps before it

    def snapshot(self, trainer: Trainer, module: LightningModule, freeze_policy: FreezePolicy, loss: MeanLoss) -> None:
        """Keep, before the first batch of a step, what a forward pass changes, such as running statistics.

        Args:
            trainer: At the start of a batch.
            module: What is trained.
            freeze_policy: Says what does not change.
            loss: Of the epoch so far.
        """
        number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._batch = (number, trainer.global_step)
        if freeze_policy.trained != self._trained:
            still = {f"backbone.{name}" for name in freeze_policy.frozen_tensors()}
            self._moving = {name: _owner(module, name) for name, _ in module.named_buffers() if name not in still}
            self._trained = freeze_policy.trained
        if (number - 1) % trainer.accumulate_grad_batches == 0:
            self._buffers = {name: getattr(owner, leaf).clone() for name, (owner, leaf) in self._moving.items()}
            self._loss = loss.sums

    def rewind(self, trainer: Trainer, checkpoint: dict[str, Any], loss: MeanLoss) -> Tensor:
        """Change a checkpoint that was taken between steps: running statistics, and the place in the data.

        Returns:
            The sums of the epoch's loss (2,) that belong to it.
        """
        epoch_loop = trainer.fit_loop.epoch_loop
        now = epoch_loop.batch_progress.current
        every = trainer.accumulate_grad_batches
        within = now.ready > now.processed  # type: ignore[attr-defined]  # a batch's progress has it
        begun = within and self._batch[0] == now.ready
        if within and not (begun and trainer.global_step > self._batch[1]):
            extra = (now.ready - 1) % every + 1
        elif within or now.ready >= trainer.num_training_batches or epoch_loop.batch_progress.is_last_batch:
            extra = 0  # Lightning steps on the last batch of an epoch
        else:
            extra = now.ready % every
        sums = loss.sums
        fit = checkpoint["loops"]["fit_loop"]
        progress = fit["epoch_loop.batch_progress"]
        ended = fit["epoch_progress"]["current"]["ready"] == fit["epoch_progress"]["current"]["processed"]
        if ended and now.ready > 0 and not epoch_loop._num_ready_batches_reached():
            # A limit of steps or time ended the epoch, whose rest is to come.
            for counts in fit["epoch_progress"].values():
                counts["processed"] = counts["started"] - 1
                counts["completed"] = min(counts["completed"], counts["processed"])
        if extra == 0 and not within:
            if _is_amid_validation(trainer):
                for counts in (progress["current"], progress["total"]):
                    counts["completed"] = counts["processed"] - 1  # so that it is made up for
            return sums
        if extra > 0 and (begun or extra > 1 or not within):
            for key in (
                "state_dict",
                "current_model_state",
            ):  # the latter where the former is an average of the weights
                state = checkpoint.get(key, {})
                state.update({name: buffer for name, buffer in self._buffers.items() if name in state})
            sums = self._loss
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["ready"] - extra))
        progress["is_last_batch"] = progress["is_last_batch"] and extra == 0
        place = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__, {}).get("place")
        for state in (
            place,
            *fit["state_dict"].get("combined_loader", ()),
        ):  # Lightning keeps the loader's place as well
            if isinstance(state, dict) and "batches" in state:
                state["batches"] -= extra
        return sums

    def load_state(self, checkpoint: dict[str, Any], so_far: list[list[float]]) -> None:
        """Take up a checkpoint that a run goes on from.

        One from the end of a batch comes before the validation that may follow. Lightning would leave that out, and where it
        is the epoch's last batch, the epoch's end as well (lightning.pytorch.loops.fit_loop, ``reset``). So it is to count
        the batch as complete, and what follows is made up for. One from the very start of an epoch would end it at once, so
        it is taken for one from the end of the epoch before.

        Args:
            checkpoint: As it was read; it is changed.
            so_far: Sums of the epoch's loss, by rank.
        """
        progress = checkpoint["loops"]["fit_loop"]
        epochs, batches = progress["epoch_progress"]["current"], progress["epoch_loop.batch_progress"]
        if epochs["ready"] > epochs["started"]:
            for counts in progress["epoch_progress"].values():
                counts["ready"] = counts["started"]
        self._so_far = so_far if epochs["processed"] < epochs["started"] else []
        self._behind_a_batch = batches["current"]["completed"] == batches["current"]["processed"] - 1
        if self._behind_a_batch:
            for counts in (batches["current"], batches["total"]):
                counts["completed"] = counts["processed"]

    def resume(self, trainer: Trainer, loss: MeanLoss) -> bool:
        """Begin to train: at the start of an epoch, or within the one that is resumed.

        Returns:
            Whether none of its batches is left.
        """
        loss.reset()
        self._trained, self._batch = None, (-1, -1)  # since parts may have been replaced after another fit
        resumed, known = bool(self._so_far), len(self._so_far)
        if trainer.global_rank < known:
            loss.load_sums(torch.tensor(self._so_far[trainer.global_rank]))
        if resumed and known != trainer.world_size:
            rank_zero_warn(
                "the checkpoint was saved by a process that failed alone, so of the batches behind it, train_loss is of those that "
                "this one had; weights and all else are exact"
            )
        if self._behind_a_batch:
            catch_up(trainer)
        self._so_far, self._behind_a_batch = [], False
        return resumed and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
