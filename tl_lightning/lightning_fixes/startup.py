"""Say what a starting process waits for, and end it if the other processes do not come.

Lightning connects the processes without a word and with the timeout of all collective operations, 30 minutes. A process
whose peers have failed before then waits all that time:
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/fabric/utilities/distributed.py,
``_init_dist_connection``. Needed for Lightning 2.6. This file can be deleted when Lightning, or torch, says which
processes are missing, and has a timeout of its own for the start.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus

ANNOUNCE_S = 30.0
"""Time after which a process says what it waits for."""
LIMIT_S = 600.0
"""Time after which it ends; ``torchrun`` waits as long for its agents."""

_handlers: dict[signal.Signals, Any] = {}  # those of before the start


def watch_start(trainer: Trainer) -> None:
    """Watch, in a thread, until the processes of a run are connected; until then, SIGTERM and Ctrl-C end this one.

    The main thread waits in torch, where Python calls no handler of a signal.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy) or trainer.world_size == 1:
        return
    if not isinstance(trainer.accelerator, (CPUAccelerator, CUDAAccelerator)) or dist.is_initialized():
        return
    environment = strategy.cluster_environment
    if environment is not None:
        place = f"{environment.main_address}:{environment.main_port}"
        threading.Thread(target=_watch, args=(trainer, place), daemon=True, name="watch-start").start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):
                    _handlers[number] = signal.signal(number, signal.SIG_DFL)


def end_start() -> None:
    """Restore the handlers of signals, now that the processes are connected."""
    while _handlers:
        signal.signal(*_handlers.popitem())


def _watch(trainer: Trainer, place: str) -> None:
    began, announced = time.monotonic(), False
    who = f"rank {trainer.global_rank} of {trainer.world_size}"
    while not dist.is_initialized() and trainer.state.status != TrainerStatus.INTERRUPTED:
        waited = time.monotonic() - began
        if waited >= ANNOUNCE_S and not announced:
            announced = True
            _write(
                f"{who} has waited {waited:.0f} s for the other processes of this run, which meet at {place}; it waits "
                f"{LIMIT_S:.0f} s at most"
            )
        if waited >= LIMIT_S:
            _write(
                f"error: {who} has waited {waited:.0f} s at {place}, and the other processes have not come: read why "
                "they failed, or start all of them with one MASTER_ADDR and MASTER_PORT that each machine reaches"
            )
            os._exit(1)  # the main thread waits in torch, where no exception reaches it
        time.sleep(0.2)


def _write(text: str) -> None:
    sys.stderr.write(f"tl-lightning: {text}\n")
    sys.stderr.flush()
