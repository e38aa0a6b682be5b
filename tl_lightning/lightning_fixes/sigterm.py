"""End a run on SIGTERM, as from a cluster scheduler, on all ranks at the same step.

Lightning's handler talks to the other ranks from inside the signal handler, wherever these are. The ranks then hang, or
one dies with an error (https://github.com/Lightning-AI/pytorch-lightning/issues/20806). Lightning also leaves the
process group for NCCL only. Needed for Lightning 2.6 (trainer/connectors/signal_connector.py,
``_sigterm_notifier_fn``). This file can be deleted when the ranks agree between batches and leave gloo's process group.
"""

import atexit
import signal
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tl_lightning.batch import EqualBatches


class SigtermHandler(Callback):
    """Note SIGTERM, and end the run after the current batch once any rank was told to terminate.

    The ranks agree between batches. With loaders that may give ranks different numbers of batches, each rank ends by
    itself.
    """

    def __init__(self) -> None:
        self._received = False
        self.together = False
        """Whether the ranks have agreed to end."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the signals of an earlier run."""
        self._received = self.together = False
        atexit.unregister(_leave_process_group)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the process group when the process of a completed run exits."""
        atexit.register(_leave_process_group)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handler; Lightning restores the original one at the end."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    # The first of these hooks to be called replaces the handler:
    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run if a rank was told to terminate."""
        self._end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run if a rank was told to terminate."""
        self._end(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run if a rank was told to terminate."""
        self._end(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run if a rank was told to terminate."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if _has_equal_batches(trainer):
            self.together = trainer.strategy.reduce_boolean_decision(self._received, all=False)
            if self.together:
                atexit.register(_leave_process_group)
                raise SIGTERMException
        elif self._received:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes that this one has started
            raise SIGTERMException


def _leave_process_group() -> None:
    """Leave the process group before Python shuts down.

    Otherwise a process that has done its work may die of SIGABRT, because gloo's threads still hold tensors (torch
    2.15). After an error the group is kept: leaving it would wait for a rank that may wait for this one.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ends_together(trainer: Trainer) -> bool:
    """Return whether all ranks have agreed to end, so that one may wait for the others."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    return any(isinstance(callback, SigtermHandler) and callback.together for callback in callbacks)


def _has_equal_batches(trainer: Trainer) -> bool:
    """Return whether all ranks run equally many batches: in training, and with this library's loaders."""
    loader = getattr(trainer._active_loop, "_combined_loader", None)
    loaders = [] if loader is None else loader.flattened
    return trainer.training or (bool(loaders) and all(isinstance(one, EqualBatches) for one in loaders))
