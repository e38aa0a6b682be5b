"""Checkpoints lie at optimizer steps: one that is asked for between them goes back to the last."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tl_lightning.freezing import Staging


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Take a checkpoint from the end of an epoch to the start of the next one, for a run that ends by ``max_steps``.

    Lightning does so itself where a run ends by ``max_epochs`` alone; otherwise it would begin the next epoch under the
    number of the one before, and so with its data (lightning.pytorch.loops.fit_loop, ``_iteration_based_training``).
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]
    now = epochs["current"]
    if not now["ready"] == now["started"] == now["processed"] == now["completed"] + 1:
        return
    for counts in (epochs["current"], epochs["total"]):
        counts["completed"] = counts["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    batches["total"]["completed"] = batches["total"]["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)


def lacks_validation(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint lies between an epoch's last batch and its end: Lightning goes on without the validation."""
    progress = checkpoint["loops"]["fit_loop"]
    epochs = progress["epoch_progress"]["current"]
    return bool(progress["epoch_loop.batch_progress"]["is_last_batch"] and epochs["processed"] < epochs["started"])


class StepBoundary:
    """Take a checkpoint back to the optimizer's last step, since neither half a batch nor accumulated gradients are saved.

    A resumed run then sees the batches since that step again, and ends with the bits of the uninterrupted one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._trained: frozenset[str] | None = None
        self._moving: list[str] = []
        self._batch = (-1, -1)  # of the batch at hand: its number in the epoch, from 1, and the steps before it

    def begin(self, trainer: Trainer, module: LightningModule, staging: Staging) -> None:
        """Keep, before the first batch of a step, what a forward pass changes, such as running statistics.

        Args:
            trainer: At the start of a batch.
            module: What is trained.
            staging: Says what does not change.
        """
        number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._batch = (number, trainer.global_step)
        if staging.trained != self._trained:
            still = {f"backbone.{name}" for name in staging.still()}
            self._moving = [name for name, _ in module.named_buffers() if name not in still]
            self._trained = staging.trained
        if (number - 1) % trainer.accumulate_grad_batches == 0:
            self._buffers = {name: module.get_buffer(name).clone() for name in self._moving}

    def go_back(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint that was taken between steps: running statistics, and the place in the data."""
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
        if extra == 0 and not within:
            return
        if extra > 0 and (begun or extra > 1 or not within):
            for key in (
                "state_dict",
                "current_model_state",
            ):  # the latter where the former is an average of the weights
                state = checkpoint.get(key, {})
                state.update({name: buffer for name, buffer in self._buffers.items() if name in state})
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["ready"] - extra))
        place = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__, {}).get("place")
        if place is not None:
            place["batches"] -= extra
