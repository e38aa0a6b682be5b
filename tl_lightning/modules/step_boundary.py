"""Checkpoints lie between optimizer steps: one that is asked for while gradients accumulate goes back to the last step."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def batches_since_step(trainer: Trainer) -> int:
    """Return how many batches of the epoch have begun since the optimizer's last step; 0 where it has just stepped."""
    epoch_loop = trainer.fit_loop.epoch_loop
    begun: int = epoch_loop.batch_progress.current.ready
    if begun >= trainer.num_training_batches or epoch_loop.batch_progress.is_last_batch:
        return 0  # Lightning steps on the last batch of an epoch
    return begun % trainer.accumulate_grad_batches


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


class StepBoundary:
    """Take a checkpoint back to the optimizer's last step, since accumulated gradients are not saved.

    A resumed run then sees the batches since that step again, and ends with the bits of the uninterrupted one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def remember(self, module: LightningModule, still: set[str]) -> None:
        """Keep what a forward pass changes, such as running statistics, before the first batch of a step.

        Args:
            module: What is trained.
            still: Names of what does not change.
        """
        self._buffers = {name: b.clone() for name, b in module.named_buffers() if name not in still}

    def go_back(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint that was taken while gradients accumulate: running statistics, and the place in the data."""
        extra = batches_since_step(trainer)
        if extra == 0:
            return
        for key in ("state_dict", "current_model_state"):  # the latter where the former is an average of the weights
            state = checkpoint.get(key, {})
            state.update({name: buffer for name, buffer in self._buffers.items() if name in state})
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(counts, counts["ready"] - extra))
        place = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__, {}).get("place")
        if place is not None:
            place["batches"] -= extra
