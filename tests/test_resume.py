"""A run that is interrupted at any point and resumed ends with the same bits as an uninterrupted run."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as Plateau

from tests.doubles import DropoutProbe, TinyBackbone
from tests.ranks import ROOT, run_on_ranks
from tests.staged import classifier, images, trainer
from tl_lightning.callbacks import EMA
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe
from tl_lightning.utils.hashing import fingerprint

# Lightning warns because the resumed runs write no checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")


class Losses(pl.Callback):
    """Record the training loss by epoch, and the validation loss by the number of batches before it.

    Each loss comes with the step under which it is logged. ``started`` maps each batch to the step at its start.
    """

    def __init__(self) -> None:
        self.max_steps = -1
        self.train: dict[int, tuple[float, int]] = {}
        self.val: dict[int, tuple[float, int]] = {}
        self.started: dict[int, int] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.started[loop.total_batch_idx] = loop._batches_that_stepped

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.max_steps = trainer.max_steps

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        self.train[trainer.current_epoch] = math.nan if loss is None else float(loss), -1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for epoch in [*self.train][-1:]:  # its loss has been logged by now
            self.train[epoch] = self.train[epoch][0], trainer.fit_loop.epoch_loop._batches_that_stepped

    on_train_end = on_train_epoch_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.val[trainer.fit_loop.total_batch_idx] = float(trainer.callback_metrics["val_loss"]), step

    def difference(self, whole: "Losses", checkpoint: Path) -> str:
        """Describe how the losses of this resumed run differ from those of the whole run; empty if they agree."""
        saved = torch.load(checkpoint, weights_only=True)
        loop = saved["loops"]["fit_loop"]
        if saved["global_step"] == self.max_steps:
            return ""  # the run was complete, so the resumed one trains no further
        batches, epochs = loop["epoch_loop.batch_progress"]["total"], loop["epoch_progress"]["current"]
        train = {epoch: loss for epoch, loss in whole.train.items() if epoch >= epochs["processed"]}
        after = batches["ready"] - (batches["ready"] > batches["completed"])  # a completed batch was validated
        val = {batch: loss for batch, loss in whole.val.items() if batch >= after}
        started = {batch: step for batch, step in whole.started.items() if batch >= batches["ready"]}
        found, expected = (self.train, self.val, self.started), (train, val, started)
        return "" if found == expected else f"got {found}, expected {expected}"


def fit(
    photos: str, folder: Path, resume: Path | None = None, world: int = 1, batch_size: int = 8, **options: Any
) -> tuple[LinearProbe, pl.Trainer, Losses]:
    """Fit with all sources of randomness: sample order, augmentation in two worker processes, dropout."""
    torch.manual_seed(0 if resume is None else 99)  # a resumed process starts from another RNG state
    backbone = TinyBackbone()
    data = ImageFolderDataModule(photos, batch_size=batch_size, num_workers=2, preprocessing=backbone.preprocessing)
    monitor = options.pop("plateau", None)
    scheduler = monitor and partial(Plateau, monitor=monitor, patience=0, threshold=1.0, factor=0.5)
    model = DropoutProbe(backbone, num_classes=3, lr=0.01, scheduler=scheduler)
    every_step = ModelCheckpoint(
        folder, "step-{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=True
    )
    losses = Losses()
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
        "callbacks": [losses]
        if resume
        else [losses, every_step, *_other_checkpoints(folder, "accumulate_grad_batches" in options)],
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": resume is None,
    }
    trainer = pl.Trainer(**(defaults | options))
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    return model, trainer, losses


class SaveEachBatch(pl.Callback):
    """Save after each batch, also within an accumulation, as Lightning does on a signal or after a time interval."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        name = f"batch-{trainer.current_epoch}-{trainer.fit_loop.epoch_loop.batch_progress.current.ready}.ckpt"
        trainer.save_checkpoint(self.folder / name)


def _other_checkpoints(folder: Path, between_steps: bool) -> list[pl.Callback]:
    return [
        *([SaveEachBatch(folder)] if between_steps else []),
        ModelCheckpoint(folder, "validation-{epoch}", save_top_k=-1, monitor="val_loss", save_on_train_epoch_end=False),
        ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]


def resume_from_each_checkpoint(photos: str, folder: str, world: int, **options: Any) -> dict[str, list[str]]:
    """Fit, resume from each checkpoint, and return the outcomes by checkpoint name, the uninterrupted run first.

    An outcome is a fingerprint of the weights, the learning rates, the number of steps and the difference in losses.
    """

    def outcome(model: LinearProbe, trainer: pl.Trainer, loss_difference: str) -> list[str]:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        return [fingerprint(model.state_dict()), str(rates), str(trainer.global_step), loss_difference]

    root = Path(folder)
    model, trainer, whole = fit(photos, root, None, world, **options)
    results = {"uninterrupted": outcome(model, trainer, "")}
    trainer.strategy.barrier()
    for checkpoint in sorted(root.glob("*.ckpt")):
        model, trainer, losses = fit(photos, root, checkpoint, world, **options)
        results[checkpoint.stem] = outcome(model, trainer, losses.difference(whole, checkpoint))
    if world > 1:
        own = sorted(root.glob("*.ckpt"))[trainer.global_rank]
        with pytest.raises(ValueError, match="the processes resume from different checkpoints"):
            fit(photos, root, own, world, **options)
    return results


def check_outcomes(results: dict[str, list[str]], steps_per_epoch: int) -> None:
    saved = {name.partition("=")[0] for name in results}
    assert saved - {name for name in saved if name.startswith("batch-")} == {
        *("uninterrupted", "step-step", "validation-epoch", "epoch-epoch")
    }
    assert sum(name.startswith("batch-") for name in results) == (3 * 4 if steps_per_epoch == 2 else 0)
    assert sum(name.startswith("step-") for name in results) == 3 * steps_per_epoch
    differing = {name: result for name, result in results.items() if result != results["uninterrupted"]}
    assert differing == {}


@pytest.mark.parametrize(
    ("world", "options", "steps_per_epoch"),
    [
        (1, {}, 4),
        (1, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, 2),
        pytest.param(1, {"plateau": "train_loss", "check_val_every_n_epoch": 2}, 4, marks=pytest.mark.slow),
        (2, {}, 4),
        pytest.param(2, {"val_check_interval": 0.5}, 4, marks=pytest.mark.slow),
        pytest.param(2, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, 2, marks=pytest.mark.slow),
        pytest.param(2, {"max_steps": 12}, 4, marks=pytest.mark.slow),
        pytest.param(2, {"plateau": "val_loss"}, 4, marks=pytest.mark.slow),
    ],
    ids=[
        "one process",
        "one process, accumulated and clipped",
        "one process, plateau of train_loss",
        "two ranks",
        "two ranks, validated within the epoch",
        "two ranks, accumulated and clipped",
        "two ranks, ended by max_steps",
        "two ranks, plateau of val_loss",
    ],
)
def test_run_resumed_from_any_checkpoint_ends_with_the_same_bits(
    world: int, options: dict[str, Any], steps_per_epoch: int, photos: Path, tmp_path: Path
) -> None:
    ranks = run_on_ranks(
        "tests.test_resume",
        "resume_from_each_checkpoint",
        tmp_path / "out",
        world=world,
        photos=str(photos),
        folder=str(tmp_path / "checkpoints"),
        batch_size=8 // world,
        **options,
    )
    assert all(rank == ranks[0] for rank in ranks), "the ranks end differently"
    check_outcomes(ranks[0], steps_per_epoch)


class SaveWithinEachBatch(pl.Callback):
    """Save at each moment of a batch at which ``ModelCheckpoint(save_on_exception=True)`` may have to save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: pl.Trainer, moment: str) -> None:
        if trainer.sanity_checking:
            return
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{number:02}-{moment}.ckpt", weights_only=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "started")

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "forward")

    def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "backward")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "end")

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready
        if batch == 1:
            self._save(trainer, "validated")


@pytest.mark.parametrize(
    ("options", "average", "scheduler", "checkpoints"),
    [
        ({}, False, None, 46),
        ({"accumulate_grad_batches": 2, "max_epochs": -1, "max_steps": 4}, True, None, 42),
        (
            {"accumulate_grad_batches": 2},
            False,
            partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
            42,
        ),
        (
            {"limit_train_batches": 3, "check_val_every_n_epoch": 2},
            False,
            partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
            34,
        ),
        ({"val_check_interval": 1, "limit_train_batches": 3}, False, None, 44),
    ],
    ids=[
        "default",
        "averaged weights, ended by max_steps",
        "user's scheduler, accumulated",
        "user's scheduler, limited batches",
        "validated after each batch",
    ],
)
def test_run_interrupted_within_a_batch_ends_with_the_same_bits(
    options: dict[str, Any], average: bool, scheduler: Any, checkpoints: int, photos: Path, tmp_path: Path
) -> None:
    def fit(resume: Path | None, *callbacks: pl.Callback) -> tuple[str, Losses]:
        model, losses = classifier(lr=0.05, train_bn=True, scheduler=scheduler), Losses()
        averages = [EMA(0.9)] * average
        run = trainer(tmp_path, losses, *callbacks, *averages, **({"max_epochs": 2} | options))
        run.fit(model, images(photos, batch_size=6), ckpt_path=resume, weights_only=True)
        return fingerprint(model.state_dict()), losses

    whole, losses = fit(None, SaveWithinEachBatch(tmp_path))
    found = sorted(tmp_path.glob("*.ckpt"))
    assert len(found) == checkpoints
    ends = {checkpoint: fit(checkpoint) for checkpoint in found}
    assert [checkpoint.stem for checkpoint, (end, _) in ends.items() if end != whole] == []
    differences = {at.stem: resumed.difference(losses, at) for at, (_, resumed) in ends.items()}
    assert {name: difference for name, difference in differences.items() if difference} == {}


class StopWithinEpoch(pl.Callback):
    """Stop the trainer within the second epoch, as a time limit does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready == trainer.num_training_batches + 1


@pytest.mark.parametrize("every", [1, 2], ids=["step after each batch", "accumulated"])
@pytest.mark.parametrize("limit", ["steps", "time"])
def test_run_that_a_limit_ended_within_an_epoch_resumes_there(
    limit: str, every: int, photos: Path, tmp_path: Path
) -> None:
    def fit(resume: Path | None, *callbacks: pl.Callback, **options: Any) -> tuple[str, pl.Trainer]:
        plateau = partial(Plateau, monitor="train_loss", patience=0, threshold=1.0, factor=0.5)
        model = classifier(lr=0.05, train_bn=True, scheduler=plateau)
        run = trainer(tmp_path, *callbacks, **({"max_epochs": 3, "accumulate_grad_batches": every} | options))
        run.fit(model, images(photos, batch_size=6), ckpt_path=resume, weights_only=True)
        return fingerprint(model.state_dict()), run

    whole, _ = fit(None)
    last = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    limits = {"max_steps": 6 // every} if limit == "steps" else {}
    _, ended = fit(None, last, *([] if limits else [StopWithinEpoch()]), enable_checkpointing=True, **limits)
    assert 0 < ended.fit_loop.epoch_loop.batch_progress.current.ready < ended.num_training_batches
    ended.save_checkpoint(tmp_path / "after.ckpt")
    assert [fit(tmp_path / name)[0] for name in ("last.ckpt", "after.ckpt")] == [whole] * 2


def test_each_source_of_randomness_changes_the_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without randomness in the run, the tests above would prove nothing."""
    model, *_ = fit(str(photos), tmp_path / "a")
    assert float(model.head.state_dict()["standardize.variance"].mean()) > 1e-2, "the features are constant"
    again, *_ = fit(str(photos), tmp_path / "b")
    assert fingerprint(model.state_dict()) == fingerprint(again.state_dict())
    for source in ("order", "augmentation", "step"):
        changed = partial(_repr_with_change, source)  # only this source draws other numbers
        monkeypatch.setattr("tl_lightning.utils.seeding.repr", changed, raising=False)
        assert fingerprint(fit(str(photos), tmp_path / source)[0].state_dict()) != fingerprint(model.state_dict()), (
            source
        )


def _repr_with_change(source: str, parts: tuple[int | str, ...]) -> str:
    return str(parts) + ("changed" if source in parts else "")


SLOW_RUN = """
import sys, time
import lightning.pytorch as pl
from tl_lightning.cli import main
import tests.doubles
pl.LightningModule.on_train_batch_end = lambda self, *a: time.sleep(0.15)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_command_resumed_from_its_last_checkpoint_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    def command(folder: str, *more: str) -> list[str]:
        return [
            *(sys.executable, "-W", "ignore", "-c", SLOW_RUN, "fit"),
            *(
                "--backbone",
                "tests.doubles.TinyBackbone",
                "--model",
                "tests.doubles.DropoutProbe",
                "--model.lr",
                "0.01",
            ),
            *("--data", "ImageFolderDataModule", "--data.root", str(photos), "--data.batch_size", "4"),
            *("--trainer.max_epochs", "4", "--trainer.default_root_dir", str(tmp_path / folder)),
            *more,
        ]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command("undisturbed"), check=True, env=environment, capture_output=True)  # noqa: S603
    process = subprocess.Popen(  # noqa: S603
        command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    last = tmp_path / "killed" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not (last.exists() and torch.load(last, weights_only=True)["epoch"] >= 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load(last, weights_only=True)["epoch"] < 3, "the run ended before it was killed"
    subprocess.run(command("killed", "--ckpt_path", str(last)), check=True, env=environment, capture_output=True)  # noqa: S603
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["version_0"], (
        "the resumed run has made a new folder"
    )
    assert (last.parents[1] / "metrics.csv").read_text().splitlines()[1].startswith("0,"), (
        "the earlier metrics are lost"
    )
    ends = [
        torch.load(tmp_path / run / "version_0/checkpoints/last.ckpt", weights_only=True)
        for run in ("undisturbed", "killed")
    ]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
    best = [tmp_path / run / "version_0/checkpoints/best.ckpt" for run in ("undisturbed", "killed")]
    assert len({fingerprint(LinearProbe.load_from_checkpoint(path).state_dict()) for path in best}) == 1
