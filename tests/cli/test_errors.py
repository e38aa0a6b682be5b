"""A mistake in a command line or a configuration is explained: what was given, what is allowed, what to do next."""

import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli.runs import fit, refused
from tests.doubles import image_folder
from tl_lightning.data.image_loader import ImageDataset, ImageLoader
from tl_lightning.data.sampler import DistributedBatchSampler

PARTIAL = "--model=PartialFineTuning"
STAGED = "--trainer.callbacks=StagedUnfreezing"


@pytest.mark.parametrize(
    ("options", "said", "listed"),
    [
        (
            [PARTIAL, "--model.unfreez_from=layer4"],
            "PartialFineTuning has no option 'unfreez_from'; did you mean 'unfreeze_from'?",
            "fit --model.help PartialFineTuning",
        ),
        (
            ["--model.unfreez_from=layer4"],
            (
                "LinearProbe has no option 'unfreez_from'\n"
                "PartialFineTuning has 'unfreeze_from': name the class with --model PartialFineTuning"
            ),
            "fit --model.help LinearProbe",
        ),
        (["--data.rot=x"], "ImageFolderDataModule has no option 'rot'; did you mean 'root'?", "fit --data.help Image"),
        (
            ["--backbone.nam=x"],
            "TorchvisionBackbone has no option 'nam'; did you mean 'name'?",
            "fit --backbone.help T",
        ),
        (["--maxepochs=x"], "has no option 'maxepochs'; did you mean 'trainer.max_epochs'?", "fit --help"),
        (
            ["--trainer.callbacks=EMA", "--trainer.callbacks.deca=0.9"],
            "EMA has no option 'deca'; did you mean 'decay'?",
            "fit --trainer.callbacks.help EMA",
        ),
        (
            ["--model.optimizer=SGD", "--model.optimizer.momentu=0.9"],
            "SGD has no option 'momentu'; did you mean 'momentum'?",
            "fit --model.optimizer.help SGD",
        ),
        (
            ["--model.optimizer.lr=0.1"],
            (
                "--model.optimizer.lr is an option of a class, and no class is named: name it before, as in "
                "--model.optimizer CLASS --model.optimizer.lr ...\nFor the learning rate, use --model.lr"
            ),
            "fit --help",
        ),
    ],
)
def test_misspelt_option_suggests_the_right_one(
    options: list[str], said: str, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "fit", "--data.root=x", *options)
    assert said in message
    assert f"All options: tl-lightning {listed}" in message


@pytest.mark.parametrize(
    ("options", "said", "listed"),
    [
        ([], "ImageFolderDataModule needs 'root': add --data.root FOLDER", "--data.help ImageFolderDataModule"),
        (
            ["--data.root=x", PARTIAL],
            "PartialFineTuning needs 'unfreeze_from': add --model.unfreeze_from STAGE",
            "--model.help PartialFineTuning",
        ),
        (
            ["--data.root=x", STAGED],
            "StagedUnfreezing needs 'schedule': add --trainer.callbacks.schedule '{3: layer4}'",
            "--trainer.callbacks.help StagedUnfreezing",
        ),
    ],
)
def test_missing_option_is_shown_with_a_placeholder(
    options: list[str], said: str, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "fit", *options)
    assert said in message
    assert f"All options: tl-lightning fit {listed}" in message


class UntypedHead(nn.Module):
    def __init__(self, in_features, num_classes, width=8) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - tested here
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Linear(width, num_classes))


def test_class_without_type_annotations_is_to_be_annotated(capsys: pytest.CaptureFixture[str]) -> None:
    head = ["--model=CustomHeadClassifier", "--model.head=tests.cli.test_errors.UntypedHead"]
    message = refused(capsys, "fit", "--data.root=x", *head)
    assert "UntypedHead does not annotate the type of its argument 'in_features'" in message
    assert "annotate its arguments" in message


def test_unknown_class_suggests_a_known_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {class_path: PartialFinetuning, init_args: {unfreeze_from: layer4}}")
    for options in (["--model=PartialFinetuning"], [f"--config={tmp_path / 'wrong.yaml'}"]):
        message = refused(capsys, "fit", "--data.root=x", *options)
        assert "unknown class 'PartialFinetuning'; did you mean 'PartialFineTuning'? --model has Custom" in message
        assert "by its dotted path, as --model my_module.MyClass" in message


def test_class_of_a_missing_module_says_where_it_was_searched(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "--data.root=x", "--model=my_absent_module.Smoothed")
    assert "--model my_absent_module.Smoothed cannot be found: No module named 'my_absent_module'" in message
    assert f"searched for in the current folder, {Path.cwd()}, and among the installed packages" in message


@pytest.mark.parametrize("given", ["{conv_head: 0}", "['conv_head']"])
def test_schedule_of_another_form_shows_the_right_form(
    given: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    callback = f"{{class_path: StagedUnfreezing, init_args: {{schedule: {given}}}}}"
    (tmp_path / "wrong.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
    for options in ([STAGED, f"--trainer.callbacks.schedule={given}"], [f"--config={tmp_path / 'wrong.yaml'}"]):
        message = refused(capsys, "fit", "--data.root=x", *options)
        assert "it takes {epoch: stage}, as {3: layer4}" in message
        assert "conv_head" in message


def test_option_of_a_callback_that_is_not_the_last_says_how_to_reach_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "two.yaml"
    staged = "{class_path: StagedUnfreezing, init_args: {schedule: {5: stem}}}"
    config.write_text(f"trainer: {{callbacks: [{staged}, {{class_path: ProbeFallback}}]}}")
    message = refused(capsys, "fit", "--data.root=x", f"--config={config}", "--trainer.callbacks.schedule={1: stem}")
    assert "ProbeFallback has no option 'schedule'\nStagedUnfreezing has 'schedule'\n" in message
    assert "go to the last callback of the list" in message


def test_argument_beside_class_path_is_to_be_moved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {class_path: LinearProbe, lr: 0.1}")
    message = refused(capsys, "fit", "--data.root=x", f"--config={tmp_path / 'wrong.yaml'}")
    assert "'lr' stands beside class_path in the configuration: put it under init_args" in message


def test_value_of_another_type_names_the_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.lr is abc; it takes float" in refused(capsys, "fit", "--data.root=x", "--model.lr=abc")
    assert "--trainer.max_epochs is many; it takes int or null" in refused(capsys, "fit", "--trainer.max_epochs=many")


def test_unknown_command_suggests_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'fitt'; did you mean 'fit'" in refused(capsys, "fitt")


def test_missing_command_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a command is missing: give one of fit, validate, test, predict" in refused(capsys)


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["--config", "quickstart", "fit"], "tl-lightning fit --config quickstart"),
        (["--trainer.max_epochs=1", "predict"], "tl-lightning predict --trainer.max_epochs=1"),
        (["--data.root", "photos"], "tl-lightning fit --data.root photos"),
    ],
)
def test_option_before_the_command_shows_the_right_order(
    words: list[str], right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{words[0]!r} stands where the command belongs: write {right}\n" in refused(capsys, *words)


def test_configuration_without_a_value_is_not_the_next_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in refused(capsys, "fit", "--config", "--print_config")


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_command_without_a_checkpoint_asks_for_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, command, "--data.root=x")
    assert f"{command} needs a trained model: add --ckpt_path FILE" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "CachedFeaturesDataModule needs 'images.root': add --data.images.root FOLDER"),
        (
            ["--data.augment=x"],
            "CachedFeaturesDataModule has no option 'augment'\nIts images have 'augment': use --data.im",
        ),
        (
            ["--data.images=photos"],
            "--data.images is photos, which is not a class of images; to name a folder, use --data.images.root photos",
        ),
        (["--data.images.root=x", "--lr=0.01"], "--lr is 0.01; it takes a list, as '[0.001, 0.01]'"),
        (["--data.images.root=x", "--lr=[1e-2"], "--lr is [1e-2; it takes a list"),
        (["--data.images.root=x", "--weight_decay=x"], "--weight_decay is x; it takes a list, as '[0.0, 1.0]'"),
        (["--data.images.root=x", "--boundaries=layer3"], "--boundaries is layer3; it takes a list of stages"),
        (
            ["--data.images.root=x", "--heads=LinearHead"],
            "--heads is LinearHead; it takes a list of classes, as '[{class_path: L",
        ),
        (["--data.images.root=x", "--heads=[NoHead]"], "it takes a list of classes, as '[{class_path: LinearHead}"),
    ],
)
def test_wrong_option_of_a_sweep_shows_the_right_form(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "sweep", *options)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line_that_keeps_its_place_in_the_code(workers: int, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", {"ant": 6, "bee": 6})
    for broken in photos.rglob("*.png"):
        broken.write_bytes(broken.read_bytes()[:90])
    with pytest.raises(ValueError, match="cannot read the image") as caught:
        fit(photos, tmp_path / "runs", f"--data.num_workers={workers}")
    assert len(str(caught.value).splitlines()) == 1
    shown = "".join(traceback.format_exception(caught.value))
    assert "in read_image" in shown, "the place where it was raised is lost"


def _fails(image: torch.Tensor) -> torch.Tensor:
    raise LookupError("a mistake in a transform of the user")


def test_mistake_in_the_code_of_the_user_keeps_its_traceback() -> None:
    dataset = ImageDataset(lambda _: torch.zeros(3, 4, 4, dtype=torch.uint8), [0, 1], _fails, seed=0)
    loader = ImageLoader(dataset, DistributedBatchSampler(2, 2, shuffle=False), num_workers=1, pin_memory=False)
    with pytest.raises(LookupError, match=r"(?s)Traceback.*in _fails.*a mistake in a transform of the user"):
        next(iter(loader))
    loader.close()
