"""A run that is told to terminate ends on all ranks after the same batch, whichever of them is told."""

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


class Tell(pl.Callback):
    """Send the signal to one process in the middle of its second batch."""

    def __init__(self, told: int) -> None:
        self.told = told

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == self.told:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(world: int, photos: str, folder: str) -> list[int]:
    ends = []
    for told in range(world):
        run = trainer(folder, Tell(told), devices=world, strategy="ddp" if world > 1 else "auto")
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            run.fit(classifier(), images(photos, batch_size=4 // world))
        assert signal.getsignal(signal.SIGTERM) is before
        ends.append(run.global_step)
    return ends


class TellSanityCheck(pl.Callback):
    """Send the signal to all processes before the first validation."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated_in_the_sanity_check(world: int, photos: str, folder: str) -> int:
    options: dict[str, Any] = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    run = trainer(folder, TellSanityCheck(), **options)
    with pytest.raises(SIGTERMException):
        run.fit(classifier(), images(photos, batch_size=4 // world))
    return run.global_step


def terminated_in_scoring(world: int, photos: str, folder: str) -> list[list[int]]:
    """Tell one rank alone, with loaders that give all ranks equally many batches."""
    ends = []
    for doing in ("validate", "test", "predict"):
        hook = f"on_{'validation' if doing == 'validate' else doing}_batch"
        seen: list[int] = []

        def tell(trainer: pl.Trainer, _: Any, batch: Any, number: int, *args: Any, seen: list[int] = seen) -> None:
            seen.append(number)
            if number == 1 and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run = trainer(folder, pl.callbacks.LambdaCallback(**{f"{hook}_start": tell}), devices=world, strategy="ddp")
        with pytest.raises(SIGTERMException):
            getattr(run, doing)(classifier(), images(photos, batch_size=1))
        ends.append(seen)
    return ends


def test_scoring_on_two_ranks(photos: Path, tmp_path: Path) -> None:
    found = run_on_ranks(__name__, "terminated_in_scoring", tmp_path / "out", photos=str(photos), folder=str(tmp_path))
    assert found == [[[0, 1]] * 3] * 2


def test_sanity_check(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path)}
    assert terminated_in_the_sanity_check(1, **arguments) == 0
    found = run_on_ranks(__name__, "terminated_in_the_sanity_check", tmp_path / "out", **arguments)
    assert found == [0, 0]


def test_one_process(photos: Path, tmp_path: Path) -> None:
    assert terminated(1, str(photos), str(tmp_path)) == [2]


@pytest.mark.parametrize("doing", ["validate", "test", "predict"])
def test_scoring(doing: str, photos: Path, tmp_path: Path) -> None:
    hook = "on_validation_batch_start" if doing == "validate" else f"on_{doing}_batch_start"
    tell = pl.callbacks.LambdaCallback(**{hook: lambda *_: os.kill(os.getpid(), signal.SIGTERM)})
    run = trainer(tmp_path, tell)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        getattr(run, doing)(classifier(), images(photos))
    assert signal.getsignal(signal.SIGTERM) is before


def resumed(world: int, photos: str, folder: str) -> list[list[float]]:
    """Return the losses of training, by epoch: of a whole run, one that is told to end, and two that go on in its first epoch.

    The last one goes on from what a process has saved that failed alone.
    """
    found: list[list[float]] = []
    saved, alone = Path(folder) / "saved.ckpt", Path(folder) / "alone.ckpt"
    for tell, path in ((None, None), (Tell(1), None), (None, saved), (None, alone)):
        losses: list[float] = []
        note = pl.callbacks.LambdaCallback(
            on_train_epoch_end=lambda run, _, seen=losses: seen.append(float(run.callback_metrics["train_loss"]))
        )
        saves = ModelCheckpoint(folder, "saved", every_n_train_steps=1000, save_on_exception=True)
        others = [] if tell is None else [tell, saves]
        more = {"devices": world, "strategy": "ddp", "max_epochs": 2, "enable_checkpointing": tell is not None}
        run = trainer(folder, note, *others, **more)
        with pytest.raises(SIGTERMException) if tell else nullcontext():
            run.fit(classifier(), images(photos, batch_size=4 // world), ckpt_path=path, weights_only=True)
        if tell is not None:
            content = torch.load(saved, weights_only=True)
            _, (lost, count) = content["tl_lightning"]["train_loss"]
            samples = len(images(photos).splits["train"].files)
            without = (found[0][0] * samples - lost) / (samples - count)
            content["tl_lightning"]["train_loss"].pop()
            if run.is_global_zero:
                torch.save(content, alone)
        found.append(losses)
    return [*found, [without]]


def test_loss_of_an_epoch_that_was_left_by_two_ranks(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path / "checkpoints")}
    for whole, _, rest, rest_of_one, (without,) in run_on_ranks(__name__, "resumed", tmp_path / "out", **arguments):
        assert rest == whole
        assert rest_of_one == [pytest.approx(without, rel=1e-5), *whole[1:]]


def test_two_ranks(photos: Path, tmp_path: Path) -> None:
    found = run_on_ranks(__name__, "terminated", tmp_path / "out", photos=str(photos), folder=str(tmp_path))
    assert found == [[2, 2], [2, 2]]


def left(world: int, photos: str, folder: str) -> int:
    """Write, at the end of the process, whether the ranks are still connected."""
    rank = int(os.environ["LOCAL_RANK"])
    atexit.register(lambda: Path(f"{folder}.{rank}").write_text(str(dist.is_initialized())))
    fails = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: 1 / 0)
    ends: dict[str, Any] = {"told": (Tell(1), SIGTERMException), "failed": (fails, ZeroDivisionError)}
    callback, error = ends.get(Path(folder).name, (pl.Callback(), None))
    run = trainer(folder, callback, devices=world, strategy="ddp")
    with pytest.raises(error) if error else nullcontext():
        run.fit(classifier(), images(photos, batch_size=2))
    return rank


@pytest.mark.parametrize(("how", "connected"), [("done", "False"), ("told", "False"), ("failed", "True")])
def test_ranks_that_end_in_step_part(how: str, connected: str, photos: Path, tmp_path: Path) -> None:
    # Where one fails, another may still wait for it, and parting would wait for that one.
    run_on_ranks(__name__, "left", tmp_path / "out", photos=str(photos), folder=str(tmp_path / how))
    assert [Path(f"{tmp_path / how}.{rank}").read_text() for rank in range(2)] == [connected] * 2
