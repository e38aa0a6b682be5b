"""A worker process that dies ends the run with a line that says why, and what to do; nothing waits for it."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.staged import classifier, images, trainer
from tl_lightning.callbacks import PredictionWriter
from tl_lightning.data._workers import WorkerError


@pytest.fixture(autouse=True)
def _end_workers() -> Iterator[None]:
    before = set(multiprocessing.active_children())
    yield
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
        process.join()


class KillWorker(pl.Callback):
    """Kill a worker process in the third batch, as the kernel does when the memory is full."""

    def __init__(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.number = number

    def _kill(self, batch: object) -> None:
        if batch == 2:
            os.kill(int(multiprocessing.active_children()[0].pid or 0), self.number)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._kill(args[1])

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._kill(args[1])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, r"was killed \(Killed\), as the system does when the memory is full: .* data\.num_workers"),
        (signal.SIGBUS, r"shared memory .*/dev/shm.* too small .* data\.num_workers .*--shm-size"),
    ],
)
def test_fit_ends_with_the_cause_and_the_remedy(
    number: signal.Signals, cause: str, photos: Path, tmp_path: Path
) -> None:
    data = images(photos, num_workers=2, batch_size=2)
    with pytest.raises(WorkerError, match=cause) as caught:
        trainer(tmp_path, KillWorker(number), max_epochs=3).fit(classifier(), data)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_prediction_ends_and_keeps_its_rows(photos: Path, tmp_path: Path) -> None:
    data = images(photos, num_workers=2, batch_size=2)
    with pytest.raises(WorkerError, match="was killed"):
        trainer(tmp_path, KillWorker(), PredictionWriter()).predict(classifier(), data)
    rows = (tmp_path / "predictions.partial.csv").read_text().splitlines()
    assert len(rows) >= 1 + 2 * 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
            r"shared memory .* too small",
        ),
        (OSError(24, "Too many open files"), r"cannot send its images, .*ulimit -n"),
        (RuntimeError("another error"), r"ended with exit code \d+"),
    ],
)
def test_batch_that_cannot_be_sent_ends_the_run_instead_of_being_waited_for(
    error: Exception, message: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sends batches from a thread of the worker, whose errors Python prints and ignores."""

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)  # worker processes are forked
    data = images(photos, num_workers=2, batch_size=2)
    data.setup("fit")
    with pytest.raises(WorkerError, match=message):
        list(data.train_dataloader())
