"""The version has one source, and asking for it does not load Lightning."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import tl_lightning
from tl_lightning.cli import main

CONSOLE_SCRIPT = Path(sys.executable).with_name("tl-lightning")


@pytest.mark.parametrize("program", [[sys.executable, "-X", "importtime", "-m", "tl_lightning"], [CONSOLE_SCRIPT]])
def test_version_is_printed_without_importing_lightning_or_torch(program: list[str]) -> None:
    done = subprocess.run([*program, "--version"], check=True, capture_output=True, text=True)  # noqa: S603 - our own program
    assert done.stdout == f"tl-lightning {tl_lightning.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "lightning.pytorch", "jsonargparse"}


def test_parser_knows_the_version_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tl-lightning {tl_lightning.__version__}\n"


def test_installed_metadata_has_the_same_version() -> None:
    assert version("tl_lightning") == tl_lightning.__version__
