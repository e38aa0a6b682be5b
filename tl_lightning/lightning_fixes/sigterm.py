"""End a run that is told to terminate, as by a cluster that needs the machine, on all ranks at the same step."""

import atexit
import signal
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tl_lightning.batch import KeepsInStep


class SigtermHandler(Callback):
    """Note SIGTERM, and end the run after the batch at hand, once any rank has been told.

    Lightning's own handler speaks to the other ranks from within the signal, wherever these are at that moment: their
    operations then meet each other's data, and one of them dies with an error instead of coming to its end (2.6.6,
    ``_SignalConnector._sigterm_notifier_fn``). Here, the ranks agree between batches; where other loaders than this library's
    may give them different numbers of batches to score, each ends by itself.
    """

    def __init__(self) -> None:
        self._asked = False
        self.together = False
        """Whether the ranks have agreed to end."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what another run was told."""
        self._asked = self.together = False
        atexit.unregister(_part)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the ranks of a run that came to its end part when their processes do."""
        atexit.register(_part)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which gives it back to its first owner at the end."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    # Whichever comes first:
    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run, if a rank was told to."""
        self._end(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run, if a rank was told to."""
        self._end(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run, if a rank was told to."""
        self._end(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End the run, if a rank was told to."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if _in_step(trainer):
            self.together = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
            if self.together:
                atexit.register(_part)
                raise SIGTERMException
        elif self._asked:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes that this one has started
            raise SIGTERMException


def _part() -> None:
    """Leave the process group.

    Else a process that has done its work may die of SIGABRT as it ends, because gloo's threads still hold tensors while Python
    shuts down (torch 2.15). Lightning sees to it for NCCL alone. After an error the group is kept: another rank may
    still wait for this one, and leaving would wait for that one.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ends_together(trainer: Trainer) -> bool:
    """Return whether all ranks have agreed to end, so that one may wait for the others."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's own list
    return any(isinstance(callback, SigtermHandler) and callback.together for callback in callbacks)


def _in_step(trainer: Trainer) -> bool:
    """Return whether all ranks have equally many batches: in training, and of this library's loaders."""
    loader = getattr(trainer._active_loop, "_combined_loader", None)
    loaders = [] if loader is None else loader.flattened
    return trainer.training or (bool(loaders) and all(isinstance(one, KeepsInStep) for one in loaders))
