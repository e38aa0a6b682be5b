"""Each of a hundred mistakes on the command line ends with a few lines and exit code 2 or 1, and never a traceback."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.mistakes import FILES, MISTAKES
from tests.cli.runs import Run
from tl_lightning import __main__
from tl_lightning.cli import TransferCLI, transfer_cli
from tl_lightning.cli.options import SUBCOMMANDS

COMMON = "--data.num_workers=0 --trainer.accelerator=cpu"
BACKBONE = "--backbone=tests.doubles.TinyBackbone"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def arguments(command: str, photos: Path, checkpoint: Path) -> list[str]:
    """Put the correct parts into a command."""
    parts = {
        "FIT": f"fit --data.root={photos} {COMMON} --trainer.max_epochs=1 {BACKBONE}",
        "PREDICT": f"predict --data.root={photos} {COMMON} --ckpt_path={checkpoint}",
        "SWEEP": f"sweep --data.images.root={photos} --trainer.accelerator=cpu {BACKBONE}",
        "TIMM": "--backbone=TimmBackbone --backbone.name=test_resnet --backbone.weights=null",
        "BACKBONE": BACKBONE,
    }
    words = shlex.split(command.replace("CKPT", str(checkpoint)).replace("PHOTOS", str(photos)))
    return [argument for word in words for argument in (parts[word].split() if word in parts else [word])]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistake_is_a_few_lines_and_an_exit_code(
    command: str,
    said: str,
    place: Path,
    photos: Path,
    short: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments(command, photos, short.last)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tl-lightning", *args])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    all_commands = TransferCLI.subcommands()
    if args and args[0] in all_commands:  # to build one parser instead of six
        monkeypatch.setattr(TransferCLI, "subcommands", staticmethod(lambda: {args[0]: all_commands[args[0]]}))
        monkeypatch.setattr(transfer_cli, "SUBCOMMANDS", {args[0]: SUBCOMMANDS[args[0]]})
    before = sorted(os.listdir(place))
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    message = capsys.readouterr().err.partition("tl-lightning: error: ")[2]
    assert caught.value.code == 2, message
    assert said in message
    assert len(message.splitlines()) <= 5
    assert "Traceback" not in message
    assert [name for name in sorted(os.listdir(place)) if name not in (*before, "runs", "cache")] == []


def test_there_are_a_hundred_different_mistakes() -> None:
    assert len({command for command, _ in MISTAKES}) >= 100
