"""Run the command line in this process, for the tests of the command line."""

import csv
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tl_lightning.cli import main

BACKBONE = "--backbone=tests.doubles.TinyBackbone"
PARTIAL = ("--model=PartialFineTuning", "--model.unfreeze_from=layer2")

SCHEDULE_CHANGED = "ignore:the learning rates followed a schedule:UserWarning"
"""For runs that resume with more epochs, and so with another schedule of the learning rates."""


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    printed: str

    @property
    def last(self) -> Path:
        """Its last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        """Its best checkpoint."""
        return self.folder / "checkpoints" / "best.ckpt"


def on_cpu(photos: Path, runs: Path) -> list[str]:
    """Return the options of data and trainer that all tests share."""
    data = [f"--data.root={photos}", "--data.num_workers=0"]
    return [*data, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={runs}"]


def fit(photos: Path, runs: Path, *options: str) -> Path:
    """Fit a linear probe for one epoch, unless the options say otherwise, and return the folder of the newest run."""
    backbone = [] if any(option.startswith("--backbone") for option in options) else [BACKBONE]
    main(["fit", *backbone, *on_cpu(photos, runs), "--trainer.max_epochs=1", *options])
    return max(runs.glob("version_*"), key=lambda run: int(run.name.removeprefix("version_")))


def recorded_fit(photos: Path, runs: Path, *options: str) -> Run:
    """Fit, and return the folder with all that was printed."""
    with redirect_stdout(io.StringIO()) as printed:
        folder = fit(photos, runs, *options)
    return Run(folder, printed.getvalue())


def in_one_line(printed: str) -> str:
    """Join wrapped lines, also where a long path was wrapped."""
    return re.sub(r"/ | /", "/", " ".join(printed.split()))


def metrics(folder: Path) -> list[dict[str, str]]:
    """Read the metrics of a run."""
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint."""
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that is wrong, and return its message of a few lines."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    message = capsys.readouterr().err.removeprefix("Seed set to 42\n")
    assert caught.value.code == 2
    assert message.startswith("tl-lightning: error: ")
    assert len(message.splitlines()) < 6, message
    return message


def failing(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that fails before it trains, and return its message."""
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as caught:
        main(list(args))
    return f"{caught.value}{capsys.readouterr().err}"


class Interrupt(pl.Callback):
    """Interrupt a run, as Ctrl-C does, at a batch of an epoch."""

    def __init__(self, epoch: int = 1, batch: int = 0) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if (trainer.current_epoch, args[1]) == self.at:
            raise KeyboardInterrupt


class InterruptValidation(pl.Callback):
    """Interrupt a run at the start of the validation of its second epoch."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


INTERRUPT = "tests.cli.runs.Interrupt"
INTERRUPT_VALIDATION = "tests.cli.runs.InterruptValidation"
