"""A mistake that a run would fail on is found before training, and leaves no folder behind."""

from pathlib import Path

import pytest

from tests.cli.runs import BACKBONE, Run, failing, fit
from tests.doubles import TinyBackbone, image_folder
from tl_lightning.cli import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone=TorchvisionBackbone", "--backbone.name=resnet19"], "did you mean 'resnet1"),
        (["--backbone=TorchvisionBackbone", "--backbone.name=resnet18", "--backbone.weights=x.pth"], "does not exist"),
        ([BACKBONE, "--data.root=nowhere"], "the data folder 'nowhere' does not exist"),
        (
            [BACKBONE, "--model.num_classes=7"],
            "model.num_classes is 7, but the data have 3 classes (ant, bee, cat); leave it out",
        ),
        ([BACKBONE, "--trainer.callbacks=ProbeFallback"], "ProbeFallback needs epochs"),
        ([BACKBONE, "--data.test_fraction=0", "--test_after_fit=true"], "none for 'test'"),
    ],
)
def test_mistake_is_found_before_anything_is_written(
    options: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["fit", f"--data.root={photos}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    assert message in failing(capsys, *common, *options)
    assert not list(tmp_path.iterdir())


class Unbuilt(TinyBackbone):
    """A network that takes long to download."""

    def __init__(self) -> None:
        raise RuntimeError("the network was built first")


@pytest.mark.parametrize("data", ["data", "data.images"])
def test_folder_is_checked_before_the_network_is_built(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = ["--data=CachedFeaturesDataModule"] if data == "data.images" else []
    common = ["fit", *cached, "--backbone=tests.cli.test_refused_runs.Unbuilt"]
    runs = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    one = image_folder(tmp_path / "one", {"ant": 2})
    for root, message in (("nowhere", "'nowhere' does not exist"), (one, "only the class folder 'ant'")):
        assert message in failing(capsys, *common, runs, f"--{data}.root={root}")
    two = image_folder(tmp_path / "two", {"ant": 2, "bee": 2})
    assert "the network was built first" in failing(capsys, *common, runs, f"--{data}.root={two}")


@pytest.mark.parametrize("who", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_unknown_score_is_named_before_training(who: str, photos: Path, tmp_path: Path) -> None:
    option, path = "--trainer.callbacks", who
    if who == "ReduceLROnPlateau":
        option, path = "--model.scheduler", f"lightning.pytorch.cli.{who}"
    for wrong in ("val_acc", "accuracy"):
        with pytest.raises(ValueError, match=f"{who} monitors an unknown score '{wrong}'; did you mean 'val_accuracy'"):
            fit(photos, tmp_path, f"{option}={path}", f"{option}.monitor={wrong}")
        assert not list(tmp_path.iterdir())


def test_test_of_unknown_classes_leaves_no_folder(short: Run, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", {"dog": 3, "eel": 3})
    with pytest.raises(ValueError, match="unknown class"):
        main(
            [
                "test",
                f"--data.root={other}",
                f"--ckpt_path={short.last}",
                f"--trainer.default_root_dir={tmp_path / 'runs'}",
            ]
        )
    assert not list((tmp_path / "runs").iterdir())


def test_run_that_has_trained_before_it_fails_keeps_its_folder(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_score"):
        fit(photos, tmp_path, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=no_such_score")
    assert (tmp_path / "version_0" / "config.yaml").is_file()
