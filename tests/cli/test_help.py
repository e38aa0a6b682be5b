"""The help is short, and puts the user's own choices first."""

import subprocess
import sys
import time

import pytest

from tl_lightning.cli import main


def printed_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_of_fit_names_defaults_and_puts_the_choices_of_the_user_first(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_help(capsys, "fit", "--help").splitlines()
    assert lines[0] == "usage: tl-lightning fit [--config FILE] [--data.root FOLDER] [options]"
    assert lines[2] == "Train a classifier on a folder of images."
    titles = ["The network:", "The images:", "The strategy:", "The trainer, which is Lightning's:", "The run:"]
    assert [line for line in lines if line in titles] == titles
    text = " ".join(" ".join(lines).split())
    for part in (
        "by default TorchvisionBackbone with the name resnet50",
        "by default ImageFolderDataModule",
        "by default LinearProbe",
        "or the name of a shipped one, as quickstart",
    ):
        assert part in text
    assert "_preprocessing_of" not in text


@pytest.mark.parametrize("words", [["sweep", "--help"], ["fit", "--model.help", "CustomHeadClassifier"]])
def test_help_lists_heads_and_not_all_modules(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_help(capsys, *words)
    for head in ("LinearHead", "MLPHead", "CosineHead", "ConvHead"):
        assert f".{head}" in text
    assert "torchvision.models" not in text
    assert len(text.splitlines()) < 600


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)  # noqa: S603 - our own interpreter
    return time.perf_counter() - start


@pytest.mark.slow
def test_help_costs_little_more_than_importing_lightning() -> None:
    commands = {
        "lightning": ["-c", "import lightning.pytorch"],
        "help": ["-m", "tl_lightning", "--help"],
        "fit": ["-m", "tl_lightning", "fit", "--help"],
    }
    rounds = [{name: _seconds(*command) for name, command in commands.items()} for _ in range(5)]
    seconds = {name: min(one[name] for one in rounds) for name in commands}  # side by side, the least disturbed of each
    assert seconds["help"] < 1.2 * seconds["lightning"], seconds
    assert seconds["fit"] < 1.2 * seconds["lightning"], seconds
