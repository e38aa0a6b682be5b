"""SIGTERM ends a run on all ranks after the same batch, whichever rank receives it."""

import atexit
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.ranks import run_on_ranks
from tests.staged import classifier, images, trainer


class SendSigterm(pl.Callback):
    """Send SIGTERM to one rank in the middle of its second batch."""

    def __init__(self, receiver: int) -> None:
        self.receiver = receiver

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == self.receiver:
            os.kill(os.getpid(), signal.SIGTERM)


def end_training_by_sigterm(world: int, photos: str, folder: str) -> list[int]:
    """Send SIGTERM to each rank in turn, and return the optimizer step at which each run ends."""
    ends = []
    for receiver in range(world):
        run = trainer(folder, SendSigterm(receiver), devices=world, strategy="ddp" if world > 1 else "auto")
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            run.fit(classifier(), images(photos, batch_size=4 // world))
        assert signal.getsignal(signal.SIGTERM) is before
        ends.append(run.global_step)
    return ends


class SendSigtermInSanityCheck(pl.Callback):
    """Send SIGTERM to all ranks in the sanity validation."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


def end_sanity_check_by_sigterm(world: int, photos: str, folder: str) -> int:
    options: dict[str, Any] = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    run = trainer(folder, SendSigtermInSanityCheck(), **options)
    with pytest.raises(SIGTERMException):
        run.fit(classifier(), images(photos, batch_size=4 // world))
    return run.global_step


def end_evaluation_by_sigterm(world: int, photos: str, folder: str) -> list[list[int]]:
    """Send SIGTERM to rank 1 in validation, test and prediction, and return the batches that this rank runs in each.

    The loaders give all ranks equally many batches.
    """
    ends = []
    for method in ("validate", "test", "predict"):
        hook = f"on_{'validation' if method == 'validate' else method}_batch"
        seen: list[int] = []

        def send(trainer: pl.Trainer, _: Any, batch: Any, batch_idx: int, *args: Any, seen: list[int] = seen) -> None:
            seen.append(batch_idx)
            if batch_idx == 1 and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run = trainer(folder, pl.callbacks.LambdaCallback(**{f"{hook}_start": send}), devices=world, strategy="ddp")
        with pytest.raises(SIGTERMException):
            getattr(run, method)(classifier(), images(photos, batch_size=1))
        ends.append(seen)
    return ends


def test_both_ranks_end_evaluation_after_the_same_batch(photos: Path, tmp_path: Path) -> None:
    found = run_on_ranks(
        __name__, "end_evaluation_by_sigterm", tmp_path / "out", photos=str(photos), folder=str(tmp_path)
    )
    assert found == [[[0, 1]] * 3] * 2


def test_sigterm_in_the_sanity_check_ends_the_run_before_the_first_step(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path)}
    assert end_sanity_check_by_sigterm(1, **arguments) == 0
    found = run_on_ranks(__name__, "end_sanity_check_by_sigterm", tmp_path / "out", **arguments)
    assert found == [0, 0]


def test_one_process_ends_after_the_step_in_which_it_receives_sigterm(photos: Path, tmp_path: Path) -> None:
    assert end_training_by_sigterm(1, str(photos), str(tmp_path)) == [2]


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_one_process_ends_evaluation_and_restores_the_signal_handler(method: str, photos: Path, tmp_path: Path) -> None:
    hook = "on_validation_batch_start" if method == "validate" else f"on_{method}_batch_start"
    send = pl.callbacks.LambdaCallback(**{hook: lambda *_: os.kill(os.getpid(), signal.SIGTERM)})
    run = trainer(tmp_path, send)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        getattr(run, method)(classifier(), images(photos))
    assert signal.getsignal(signal.SIGTERM) is before


def losses_by_epoch(world: int, photos: str, folder: str) -> list[list[float]]:
    """Return the training losses of four runs by epoch, and the loss that the fourth should have in its first epoch.

    The first run is uninterrupted. SIGTERM ends the second one in its first epoch. The third run resumes the second
    one. The fourth run resumes it from a checkpoint as a rank saves it that fails alone, with the loss of rank 0 only.
    """
    found: list[list[float]] = []
    saved, alone = Path(folder) / "saved.ckpt", Path(folder) / "alone.ckpt"
    for sigterm, path in ((None, None), (SendSigterm(1), None), (None, saved), (None, alone)):
        losses: list[float] = []
        record = pl.callbacks.LambdaCallback(
            on_train_epoch_end=lambda run, _, seen=losses: seen.append(float(run.callback_metrics["train_loss"]))
        )
        saves = ModelCheckpoint(folder, "saved", every_n_train_steps=1000, save_on_exception=True)
        others = [] if sigterm is None else [sigterm, saves]
        more = {"devices": world, "strategy": "ddp", "max_epochs": 2, "enable_checkpointing": sigterm is not None}
        run = trainer(folder, record, *others, **more)
        with pytest.raises(SIGTERMException) if sigterm else nullcontext():
            run.fit(classifier(), images(photos, batch_size=4 // world), ckpt_path=path, weights_only=True)
        if sigterm is not None:
            content = torch.load(saved, weights_only=True)
            _, (lost, count) = content["tl_lightning"]["train_loss"]
            samples = len(images(photos).splits["train"].files)
            expected = (found[0][0] * samples - lost) / (samples - count)
            content["tl_lightning"]["train_loss"].pop()
            if run.is_global_zero:
                torch.save(content, alone)
        found.append(losses)
    return [*found, [expected]]


def test_epoch_interrupted_on_two_ranks_logs_the_loss_of_an_uninterrupted_epoch(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path / "checkpoints")}
    for whole, _, resumed, resumed_from_one, (expected,) in run_on_ranks(
        __name__, "losses_by_epoch", tmp_path / "out", **arguments
    ):
        assert resumed == whole
        assert resumed_from_one == [pytest.approx(expected, rel=1e-5), *whole[1:]]


def test_both_ranks_end_training_after_the_same_step_whichever_receives_sigterm(photos: Path, tmp_path: Path) -> None:
    found = run_on_ranks(
        __name__, "end_training_by_sigterm", tmp_path / "out", photos=str(photos), folder=str(tmp_path)
    )
    assert found == [[2, 2], [2, 2]]


def fit_and_exit(world: int, photos: str, folder: str) -> int:
    """Fit, and write at the exit of the process whether its process group still exists."""
    rank = int(os.environ["LOCAL_RANK"])
    atexit.register(lambda: Path(f"{folder}.{rank}").write_text(str(dist.is_initialized())))
    fails = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: 1 / 0)
    ends: dict[str, Any] = {"terminated": (SendSigterm(1), SIGTERMException), "failed": (fails, ZeroDivisionError)}
    callback, error = ends.get(Path(folder).name, (pl.Callback(), None))
    run = trainer(folder, callback, devices=world, strategy="ddp")
    with pytest.raises(error) if error else nullcontext():
        run.fit(classifier(), images(photos, batch_size=2))
    return rank


@pytest.mark.parametrize(
    ("ending", "connected"),
    [
        pytest.param("completed", "False", marks=pytest.mark.slow),
        ("terminated", "False"),
        pytest.param("failed", "True", marks=pytest.mark.slow),
    ],
)
def test_ranks_leave_the_process_group_unless_one_has_failed(
    ending: str, connected: str, photos: Path, tmp_path: Path
) -> None:
    # A rank may still wait for the failed one, and leaving the group would wait for that rank.
    run_on_ranks(__name__, "fit_and_exit", tmp_path / "out", photos=str(photos), folder=str(tmp_path / ending))
    assert [Path(f"{tmp_path / ending}.{rank}").read_text() for rank in range(2)] == [connected] * 2
