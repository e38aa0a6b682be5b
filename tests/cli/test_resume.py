"""A run that is resumed by the command line goes on as if it had never been interrupted."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.cli.runs import fit
from tl_lightning.cli import main


class NoteMappedFiles(pl.Callback):
    """Note the checkpoints that this process has mapped into its memory when training begins."""

    mapped: list[str] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        type(self).mapped = [line for line in lines if line.endswith(".ckpt")]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return fit(photos, tmp_path_factory.mktemp("finished") / "runs")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The name of each file that torch.load opens, and whether it only maps the tensors."""
    opened = []
    load = torch.load

    def note(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append((Path(getattr(file, "name", file)).name, bool(kwargs.get("mmap"))))
        return load(file, *args, **kwargs)

    monkeypatch.setattr("torch.load", note)
    return opened


@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule:UserWarning")
def test_resuming_opens_the_file_once_to_look_and_once_to_load(
    finished: Path, photos: Path, reads: list[tuple[str, bool]]
) -> None:
    note = "--trainer.callbacks=tests.cli.test_resume.NoteMappedFiles"
    fit(photos, finished.parent, "--ckpt_path=last", "--trainer.max_epochs=2", note)
    assert reads == [("last.ckpt", True), ("last.ckpt", False)]
    if sys.platform == "linux":
        assert NoteMappedFiles.mapped == [], "a mapped file would change when the run overwrites it in place"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_using_a_checkpoint_reads_it_once_for_the_classifier_and_once_for_the_trainer(
    command: str, finished: Path, photos: Path, tmp_path: Path, reads: list[tuple[str, bool]]
) -> None:
    checkpoint = finished / "checkpoints" / "best.ckpt"
    data = [f"--data.root={photos}", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    main([command, *data, f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={tmp_path}"])
    assert reads == [("best.ckpt", True), ("best.ckpt", False), ("best.ckpt", False)]
