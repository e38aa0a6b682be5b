"""A run prints its plan, its outcome, and how to resume it."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.runs import INTERRUPT, PARTIAL, Run, fit, in_one_line
from tests.doubles import image_folder
from tl_lightning.cli import main


def staged(folder: Path, photos: Path, schedule: dict[int, str], max_epochs: int) -> str:
    """Write a configuration of staged unfreezing, and return the option that reads it."""
    unfreezing = {"class_path": "StagedUnfreezing", "init_args": {"schedule": schedule}}
    config = {
        "backbone": {"class_path": "tests.doubles.TinyBackbone"},
        "data": {"class_path": "ImageFolderDataModule", "init_args": {"root": str(photos), "num_workers": 0}},
        "model": {"class_path": "PartialFineTuning", "init_args": {"unfreeze_from": "layer2", "lr": 0.01}},
        "trainer": {"max_epochs": max_epochs, "default_root_dir": str(folder), "callbacks": [unfreezing]},
    }
    (folder / "staged.yaml").write_text(yaml.safe_dump(config))
    return f"--config={folder / 'staged.yaml'}"


def test_plan_of_a_staged_run_shows_each_stage(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", staged(tmp_path, photos, {1: "layer3", 5: "layer2"}, max_epochs=2)])
    printed = in_one_line(capsys.readouterr().out)
    for part in (
        "frozen stem to layer2: 2,916 parameters, in eval mode; layer2 may train, but never does in this run",
        "from epoch 0 head: 75 parameters",
        "from epoch 1 head: 75 parameters; layer3: 3,528",
        "from epoch 5 head: 75 parameters; layer2 to layer3: 5,304 (never: the run is shorter)",
        "AdamW: head 0.01, layer3 0.001 ",
    ):
        assert part in printed, part

    main(["fit", staged(tmp_path, photos, {1: "layer3"}, max_epochs=1)])
    expected = (
        "frozen stem to layer3: 6,444 parameters, in eval mode; layer2 to layer3 may train, but never do in this run"
    )
    assert expected in in_one_line(capsys.readouterr().out)


@pytest.mark.parametrize(("epoch", "advice"), [(0, "nothing yet"), (1, "the same command and --ckpt_path")])
def test_interrupted_run_says_how_to_resume(
    epoch: int, advice: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = [f"--trainer.callbacks={INTERRUPT}", f"--trainer.callbacks.epoch={epoch}", "--trainer.max_epochs=2"]
    with pytest.raises(SystemExit):
        fit(photos, tmp_path, *interrupt)
    assert advice in in_one_line(capsys.readouterr().out)


@pytest.mark.parametrize(("limit", "reached"), [("max_epochs", 1), ("max_steps", 1)])
def test_complete_run_that_is_resumed_says_how_to_train_longer(
    limit: str, reached: int, short: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the run is complete" not in short.printed
    copied = tmp_path / "version_0"
    shutil.copytree(short.folder, copied)
    last = f"--ckpt_path={copied / 'checkpoints' / 'last.ckpt'}"
    fit(photos, tmp_path, *PARTIAL, "--trainer.max_epochs=1", f"--trainer.{limit}={reached}", last)
    printed = capsys.readouterr().out
    assert "the run is complete" in printed
    assert f"resume with   the same command and --trainer.{limit} N, above {reached}\n" in printed


def test_run_that_stopped_early_says_so(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops = ["EarlyStopping", "--trainer.callbacks.monitor=val_loss", "--trainer.callbacks.stopping_threshold=100"]
    fit(photos, tmp_path, "--trainer.max_epochs=3", "--trainer.callbacks", *stops)
    assert "stopped early  in epoch 0, counted from 0, by early stopping on val_loss" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [False, True])
def test_paths_are_not_broken(
    inside: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = tmp_path / ("long-name-" * 8) / "runs [v2]"
    runs.parent.mkdir()
    monkeypatch.chdir(runs.parent if inside else tmp_path.parent)
    fit(photos, runs if inside else runs.absolute())
    folder = runs / "version_0"
    shown = folder.relative_to(Path.cwd())
    printed = capsys.readouterr().out.splitlines()
    assert f"  best model   {shown / 'checkpoints' / 'best.ckpt'}" in printed
    assert f"  outputs      {shown}" in printed


def test_names_are_printed_to_the_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder(tmp_path / "photos", {"[red]": 6, "[bold]": 6})
    fit(photos, tmp_path / "runs[v2]")
    printed = capsys.readouterr().out
    assert "2: [bold], [red]" in printed
    assert "runs[v2]" in printed.replace("\n", "").replace(" ", "")
