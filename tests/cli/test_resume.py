"""A run that is resumed by the command line ends as if it had never been interrupted."""

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.cli.runs import (
    BACKBONE,
    INTERRUPT,
    INTERRUPT_VALIDATION,
    PARTIAL,
    SCHEDULE_CHANGED,
    Run,
    fit,
    on_cpu,
    recorded_fit,
    weights,
)
from tl_lightning.cli import main
from tl_lightning.utils.hashing import fingerprint

CHECKPOINTS = "--trainer.callbacks=ModelCheckpoint"
TWO_EPOCHS = ["--data.batch_size=8", "--trainer.max_epochs=2", "--model=LinearProbe", "--model.lr=0.05"]  # of 4 steps


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of two epochs."""
    return recorded_fit(photos, tmp_path_factory.mktemp("whole") / "runs", *TWO_EPOCHS)


def test_last_is_the_checkpoint_written_last(
    whole: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one that the run writes after each epoch, and not one of the weights alone."""
    steps = [CHECKPOINTS, "--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.filename={step}"]
    steps += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    steps += ["--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.filename=weights"]
    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *TWO_EPOCHS, *steps, f"--trainer.callbacks+={INTERRUPT}", "--trainer.callbacks.batch=2")
    assert "step=6.ckpt" in capsys.readouterr().out
    folder = fit(photos, tmp_path, *TWO_EPOCHS, *steps, "--ckpt_path=last")
    assert folder.name == "version_0"
    assert fingerprint(weights(folder / "checkpoints" / "last.ckpt")) == fingerprint(weights(whole.last))


def test_run_interrupted_in_a_validation_ends_with_the_same_checkpoints_and_metrics(
    whole: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is written at the last batch of the epoch, before its validation."""
    steps = [CHECKPOINTS, "--trainer.callbacks.every_n_train_steps=4"]
    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *TWO_EPOCHS, *steps, f"--trainer.callbacks+={INTERRUPT_VALIDATION}")
    (step,) = (tmp_path / "version_0" / "checkpoints").glob("epoch=*.ckpt")
    assert str(step) in capsys.readouterr().out
    folder = fit(photos, tmp_path, *TWO_EPOCHS, *steps, "--ckpt_path=last")
    assert (folder / "metrics.csv").read_text() == (whole.folder / "metrics.csv").read_text()
    for name in ("best", "last"):
        expected = fingerprint(weights(whole.folder / "checkpoints" / f"{name}.ckpt"))
        assert fingerprint(weights(folder / "checkpoints" / f"{name}.ckpt")) == expected


@pytest.mark.filterwarnings(SCHEDULE_CHANGED)
def test_run_resumed_in_another_folder_chooses_its_best_epoch_anew(short: Run, photos: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other" / "last.ckpt"
    copied.parent.mkdir()
    shutil.copyfile(short.last, copied)
    more = [*PARTIAL, "--trainer.max_epochs=2", "--test_after_fit=true", f"--ckpt_path={copied}"]
    with pytest.warns(UserWarning, match=f"resumed run, '{short.best}', is not in the folder of this"):
        again = fit(photos, tmp_path / "again", *more)
    assert torch.load(again / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.filterwarnings(SCHEDULE_CHANGED)
def test_other_learning_rates_are_warned_of_when_a_run_resumes(short: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(short.folder, tmp_path / "version_0")
    more = [*PARTIAL, "--trainer.max_epochs=2", "--model.backbone_lr=1e-5", "--ckpt_path=last"]
    with pytest.warns(UserWarning, match="the learning rate of layer3 is 1e-05, but the resumed run had"):
        folder = fit(photos, tmp_path, *more)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.filterwarnings(SCHEDULE_CHANGED)
def test_resumed_run_keeps_its_best_score_its_metrics_and_its_configuration(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the runs is relative, as by default, and no epoch after the resumption is better."""
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", BACKBONE, *on_cpu(photos, Path("runs")), "--data.val_fraction=0.3"]
    main([*arguments, "--model.lr=0.05", "--trainer.max_epochs=6"])
    run = tmp_path / "runs" / "version_0"
    rows = (run / "metrics.csv").read_text().splitlines()
    config = (run / "config.yaml").read_text()
    best = (run / "checkpoints" / "best.ckpt").read_bytes()

    with pytest.raises(ValueError, match="drawn from seed 42 then and from seed 7 now"):
        main([*arguments, "--model.lr=0.5", "--seed_everything=7", "--trainer.max_epochs=9", "--ckpt_path=last"])
    assert (run / "config.yaml").read_text() == config, "a refused run has changed the configuration"
    assert (run / "metrics.csv").read_text().splitlines() == rows
    with (run / "metrics.csv").open("a") as file:
        file.write(rows[-1][:7])  # the run was killed while it wrote a row

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (name,) = [key for key in state["callbacks"] if key.startswith("BestCheckpoint")]
    state["callbacks"][name]["best_model_score"] = torch.tensor(2.0)  # no F1 is that high
    (path,) = state["callbacks"][name]["best_k_models"]
    state["callbacks"][name]["best_k_models"] = {path: torch.tensor(2.0)}
    torch.save(state, run / "checkpoints" / "last.ckpt")
    run = run.rename(run.with_name("version_3"))
    main([*arguments, "--model.lr=0.05", "--trainer.max_epochs=9", "--ckpt_path=last"])
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best
    after = (run / "metrics.csv").read_text().splitlines()
    assert after[: len(rows)] == rows
    assert [line.partition(",")[0] for line in after[len(rows) :]] == ["6", "6", "7", "7", "8", "8"]
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    assert sorted(path.name for path in tmp_path.joinpath("runs").iterdir()) == ["version_3"]


# Reading a checkpoint -------------------------------------------------------------------------------------------------


class NoteMappedFiles(pl.Callback):
    """Note the checkpoints that this process has mapped into its memory when training begins."""

    mapped: list[str] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        type(self).mapped = [line for line in lines if line.endswith(".ckpt")]


class Opened(NamedTuple):
    """A file that ``torch.load`` has opened, and whether it only mapped the tensors."""

    name: str
    mapped: bool


def record_torch_load(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    opened = []
    load = torch.load

    def note(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Opened(Path(getattr(file, "name", file)).name, bool(kwargs.get("mmap"))))
        return load(file, *args, **kwargs)

    monkeypatch.setattr("torch.load", note)
    return opened


@pytest.mark.filterwarnings(SCHEDULE_CHANGED)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc shows the mapped files")
def test_resuming_looks_at_the_file_once_reads_it_once_and_then_lets_go_of_it(
    short: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(short.folder, tmp_path / "version_0")
    opened = record_torch_load(monkeypatch)
    note = "--trainer.callbacks=tests.cli.test_resume.NoteMappedFiles"
    fit(photos, tmp_path, *PARTIAL, "--ckpt_path=last", "--trainer.max_epochs=2", note)
    assert opened == [Opened("last.ckpt", mapped=True), Opened("last.ckpt", mapped=False)]
    assert NoteMappedFiles.mapped == [], "a mapped file would change when the run overwrites it in place"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_checkpoint_that_a_command_uses_is_named_and_read_for_classifier_and_trainer_only(
    command: str, short: Run, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short.folder.parent.parent)
    opened = record_torch_load(monkeypatch)
    main([command, f"--data.root={photos}", "--data.num_workers=0", "--trainer.accelerator=cpu", "--ckpt_path=last"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "checkpoint " in line]
    assert row.split() == ["checkpoint", str(Path("runs/version_0/checkpoints/last.ckpt"))]
    assert opened == [Opened("last.ckpt", mapped) for mapped in (True, False, False)]
