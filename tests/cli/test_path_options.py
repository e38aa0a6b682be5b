"""The home folder and environment variables are expanded in all options that are paths, and in no other."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.runs import BACKBONE, in_one_line, on_cpu, refused
from tl_lightning.cli import TransferCLI, main

CONFIG = """
backbone: {class_path: TimmBackbone, init_args: {name: test_resnet, weights: ~/w.pth}}
data: {class_path: ImageFolderDataModule, init_args: {root: ~/photos}}
trainer:
  default_root_dir: "${SCRATCH}/runs"
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {dirpath: $SCRATCH/kept, filename: "$SCRATCH"}}
  logger: {class_path: CSVLogger, init_args: {save_dir: ~root/logs, name: "~/${SCRATCH}"}}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a fit that is parsed, but not run."""
    monkeypatch.setenv("HOME", "/home/ant")
    monkeypatch.setenv("SCRATCH", "/scratch/ant")
    (tmp_path / "paths.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setattr(TransferCLI, "before_instantiate_classes", lambda cli: None)
    monkeypatch.setattr(TransferCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(TransferCLI, "_run_subcommand", lambda cli, subcommand: None)
    cli = TransferCLI(["fit", f"--config={tmp_path / 'paths.yaml'}", "--ckpt_path=~/last.ckpt"])
    parsed: dict[str, Any] = cli.config["fit"].as_dict()
    return parsed


def test_paths_are_expanded_in_yaml_and_in_arguments(config: dict[str, Any]) -> None:
    assert config["backbone"]["init_args"]["weights"] == "/home/ant/w.pth"
    assert config["data"]["init_args"]["root"] == "/home/ant/photos"
    assert config["ckpt_path"] == "/home/ant/last.ckpt"
    assert config["trainer"]["default_root_dir"] == "/scratch/ant/runs"
    assert config["trainer"]["callbacks"][0]["init_args"]["dirpath"] == "/scratch/ant/kept"
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == f"{Path('~root').expanduser()}/logs"


def test_options_that_are_no_paths_stay_as_they_are(config: dict[str, Any]) -> None:
    assert config["trainer"]["callbacks"][0]["init_args"]["filename"] == "$SCRATCH"
    assert config["trainer"]["logger"]["init_args"]["name"] == "~/${SCRATCH}"


def test_run_lies_in_the_folder_that_a_variable_names(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(photos.parent))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text('trainer: {default_root_dir: "${SCRATCH}/runs"}', encoding="utf-8")
    common = [option for option in on_cpu(photos, tmp_path) if "_dir" not in option and "root" not in option]
    main(["fit", BACKBONE, *common, "--config=own.yaml", f"--data.root=~/{photos.name}", "--trainer.max_epochs=1"])
    saved = yaml.safe_load((tmp_path / "scratch/runs/version_0/config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["init_args"]["root"] == str(photos)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml", "scratch"]

    monkeypatch.delenv("SCRATCH")
    message = refused(capsys, "fit", BACKBONE, *common, "--config=own.yaml", f"--data.root={photos}")
    assert "--trainer.default_root_dir is '${SCRATCH}/runs', but the environment variable 'SCRATCH' is not" in message
    message = refused(capsys, "fit", BACKBONE, *common, "--data.root=~no_such_user/photos")
    assert "there is no user 'no_such_user'" in message


def test_trial_run_says_that_nothing_was_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", BACKBONE, *on_cpu(photos, tmp_path / "runs"), "--trainer.fast_dev_run=true"])
    printed = in_one_line(capsys.readouterr().out)
    assert "outputs nothing was written, since trainer.fast_dev_run only tries the configuration" in printed
    assert "None" not in printed
    assert not list(tmp_path.iterdir())
