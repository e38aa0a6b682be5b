"""``test`` and ``validate`` take model and preprocessing from a checkpoint, and only images from the data."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from tests.cli.runs import Run, in_one_line, metrics, recorded_fit
from tests.doubles import image_folder
from tl_lightning.cli import main
from tl_lightning.images import ImageError


@pytest.fixture(scope="module")
def tested(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was tested after training."""
    options = ["--test_after_fit=true", "--data.test_fraction=0.3", "--model.lr=0.05", "--trainer.max_epochs=4"]
    return recorded_fit(photos, tmp_path_factory.mktemp("tested") / "runs", *options)


def test_plan_and_scores_of_a_run_are_printed(tested: Run) -> None:
    printed = in_one_line(tested.printed)
    for part in (
        "LinearProbe on tiny",
        "3: ant, bee, cat",
        "24 train, 4 val, 13 test",
        "stem to layer3: 6,444",
        "parameters, in eval mode",
        "head: 75 parameters",
        "AdamW: head 0.05 ",
        "warm-up, then a cosine to 0 over 4 steps",
        "4 epochs, counted from 0, 4 steps",
        "best val_f1",
        "test accuracy",
        "test macro F1",
        str(tested.folder),
    ):
        assert part in printed, part


def test_test_after_fit_scores_the_best_checkpoint(tested: Run, photos: Path, tmp_path: Path) -> None:
    (score,) = [float(row["test_loss"]) for row in metrics(tested.folder) if row.get("test_loss")]
    data = [f"--data.root={photos}", "--data.num_workers=0", "--data.test_fraction=0.3"]
    main(["test", *data, f"--ckpt_path={tested.best}", f"--trainer.default_root_dir={tmp_path}"])
    (row,) = metrics(tmp_path / "version_0")
    assert float(row["test_loss"]) == pytest.approx(score, rel=1e-5)


def test_configuration_of_the_fit_is_valid_and_its_model_and_backbone_are_not_used(
    trained: Run, tmp_path: Path
) -> None:
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.05
    config["backbone"]["init_args"]["weights"] = "no/such/file.pth"
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={trained.best}"])
    main(["validate", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={trained.best}"])


def test_scores_on_other_images_are_printed(
    trained: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are new to the model: some of its classes, no splits, all of them tested."""
    image_folder(tmp_path / "held out", {"bee": 5, "cat": 4})
    common = [f"--ckpt_path={trained.best}", f"--trainer.default_root_dir={tmp_path / 'runs'}", "--data.num_workers=0"]
    main(["test", *common, f"--data.root={tmp_path / 'held out'}", "--data.test_fraction=1"])
    printed = in_one_line(capsys.readouterr().out)
    for part in (
        "tested",
        "images 9 not scored test has no image of 1 of 3 classes: ant test loss",
        "test accuracy",
        "test macro F1",
        "outputs",
    ):
        assert part in printed
    main(["validate", *common, f"--data.root={photos}", "--data.val_fraction=0.3"])
    printed = in_one_line(capsys.readouterr().out)
    for part in ("validated", "validation accuracy", "validation macro F1"):
        assert part in printed


def test_classes_that_no_split_can_score_are_named_in_the_plan_and_in_the_result(tmp_path: Path) -> None:
    """A class of one image trains on it; one of two has none for the test."""
    pairs = {f"pair {number}": 2 for number in range(6)}
    root = image_folder(tmp_path / "photos", {"one": 1, "usual": 12, **pairs})
    run = recorded_fit(root, tmp_path / "runs")
    not_scored = "not scored val has no image of 1 of 8 classes: one"
    test = "test has no image of 7 of 8 classes: one, pair 0, pair 1, pair 2, pair 3 and 2 more"
    printed = in_one_line(run.printed)
    assert f"{not_scored}; {test}" in printed
    assert not_scored in printed.partition("trained best")[2]
    with redirect_stdout(io.StringIO()) as again:
        main(["test", f"--data.root={root}", f"--ckpt_path={run.best}", f"--trainer.default_root_dir={tmp_path}"])
    assert f"not scored {test}" in in_one_line(again.getvalue())


def test_test_that_was_asked_for_without_images_is_refused_before_training(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"ant": 2, "bee": 2})
    with pytest.raises(ValueError, match="2 images for train, 2 images for val, but none for 'test'; no class has"):
        recorded_fit(root, tmp_path / "runs", "--test_after_fit=true")
    assert not list((tmp_path / "runs").iterdir())


def test_bad_images_of_all_splits_are_named_before_training(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        image_folder(tmp_path / "photos" / split, {"ant": 2, "bee": 2})
        (tmp_path / "photos" / split / "ant" / "bad.png").touch()
    bad = ", ".join(rf"'{split}/ant/bad\.png' \(it is empty\)" for split in ("test", "train", "val"))
    with pytest.raises(ImageError, match=f"3 of 15 images in .* cannot be read: {bad}; repair"):
        recorded_fit(tmp_path / "photos", tmp_path / "runs", "--test_after_fit=true")
    assert not list((tmp_path / "runs").iterdir())
