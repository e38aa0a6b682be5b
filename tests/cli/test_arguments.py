"""Configuration files, arguments and default classes are combined as a user expects."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli.runs import BACKBONE, fit
from tl_lightning.cli import main


def parsed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """Return the configuration that a fit would have, without fitting."""
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--data.root=photos", *args, "--print_config"])
    assert caught.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def class_names(config: dict[str, Any]) -> dict[str, str]:
    """Return the classes of a configuration, without their modules."""
    return {key: config[key]["class_path"].rpartition(".")[2] for key in ("backbone", "data", "model")}


def callbacks(config: dict[str, Any]) -> list[str]:
    """Return the classes of the callbacks, without their modules."""
    found = config["trainer"]["callbacks"]
    return [one["class_path"].rpartition(".")[2] for one in (found if isinstance(found, list) else [found])]


def test_default_classes_are_used_where_none_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys)
    assert class_names(config) == {
        "backbone": "TorchvisionBackbone",
        "data": "ImageFolderDataModule",
        "model": "LinearProbe",
    }
    assert config["backbone"]["init_args"]["name"] == "resnet50"


def test_configuration_without_classes_leaves_the_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(
        "trainer: {max_epochs: 1}\nmodel: {class_path: LinearProbe, init_args: {lr: 0.1}}\n"
    )
    config = parsed(capsys, f"--config={tmp_path / 'short.yaml'}", BACKBONE)
    assert class_names(config) == {"backbone": "TinyBackbone", "data": "ImageFolderDataModule", "model": "LinearProbe"}
    assert config["model"]["init_args"]["lr"] == 0.1
    assert config["trainer"]["max_epochs"] == 1


def test_arguments_override_a_configuration_that_is_named_after_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "long.yaml").write_text("trainer: {max_epochs: 90}\n")
    for config_file in ([f"--config={tmp_path / 'long.yaml'}"], ["-c", str(tmp_path / "long.yaml")]):
        assert parsed(capsys, "--trainer.max_epochs=2", *config_file)["trainer"]["max_epochs"] == 2


@pytest.mark.parametrize("named", [["--backbone", "EfficientNetLite"], ["--backbone=EfficientNetLite"]])
def test_another_backbone_takes_no_argument_of_the_one_in_the_configuration(
    named: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "resnet.yaml"
    arguments = "{name: resnet50, weights: x.pth, image_size: 64}"
    config.write_text(f"backbone: {{class_path: TorchvisionBackbone, init_args: {arguments}}}")
    expected = {"name": "efficientnet_lite0", "weights": "DEFAULT", "image_size": None}
    assert parsed(capsys, f"--config={config}", *named)["backbone"]["init_args"] == expected
    same = parsed(capsys, f"--config={config}", "--backbone=tl_lightning.backbones.TorchvisionBackbone")
    assert same["backbone"]["init_args"] == {"name": "resnet50", "weights": "x.pth", "image_size": 64}


def test_callback_without_options_may_stand_alone(
    capsys: pytest.CaptureFixture[str], photos: Path, tmp_path: Path
) -> None:
    assert callbacks(parsed(capsys, "--trainer.callbacks", "EMA")) == ["EMA"]
    folder = fit(photos, tmp_path, "--trainer.callbacks", "EMA")
    assert callbacks(yaml.safe_load((folder / "config.yaml").read_text())) == ["EMA"]
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_second_callback_is_added_to_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    staged = ["--trainer.callbacks", "StagedUnfreezing", "--trainer.callbacks.schedule", "{1: layer3}"]
    average = ["--trainer.callbacks=EMA", "--trainer.callbacks.decay=0.9"]
    config = parsed(capsys, *staged, *average)
    assert callbacks(config) == ["StagedUnfreezing", "EMA"]
    assert list(config["trainer"]["callbacks"][0]["init_args"]["schedule"].values()) == ["layer3"]
    assert config["trainer"]["callbacks"][1]["init_args"]["decay"] == 0.9


def test_optimizer_and_scheduler_are_given_by_class_path(photos: Path, tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    model = {"class_path": "LinearProbe", "init_args": {"lr": 0.3, "optimizer": optimizer, "scheduler": schedule}}
    config = tmp_path / "sgd.yaml"
    config.write_text(yaml.safe_dump({"model": model}))
    folder = fit(photos, tmp_path / "runs", f"--config={config}", "--trainer.max_epochs=2")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    groups = last["optimizer_states"][0]["param_groups"]
    assert [(g["momentum"], g["weight_decay"], g["initial_lr"], g["lr"]) for g in groups] == [(0.9, 0, 0.3, 0.075)] * 2

    optimizer["init_args"] = {"momentum": 0.9, "lr": 0.1}
    config.write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ValueError, match=r"SGD was given lr=0\.1, which would be ignored"):
        fit(photos, tmp_path / "runs", f"--config={config}")
