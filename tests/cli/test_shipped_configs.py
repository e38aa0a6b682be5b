"""The configurations that are shipped with the package are found by their bare names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runs import BACKBONE
from tl_lightning.cli import main, shipped_configs
from tl_lightning.cli.shipped_configs import resolve_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_configuration_of_the_checkout_is_found_by_its_name() -> None:
    files = sorted(ROOT.joinpath("configs").glob("*.yaml"))
    assert files
    assert [Path(resolve_config(file.stem)) for file in files] == files


def test_file_in_the_current_folder_comes_first(empty_folder: Path) -> None:
    empty_folder.joinpath("quickstart").write_text("trainer: {max_epochs: 1}")
    assert resolve_config("quickstart") == "quickstart"


def test_folder_in_the_current_folder_is_no_configuration(empty_folder: Path) -> None:
    empty_folder.joinpath("quickstart").mkdir()
    assert Path(resolve_config("quickstart")) == ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("given", ["my/own.yaml", "own.yaml", "./own", "../own.yml"])
def test_path_is_left_to_the_parser(given: str) -> None:
    assert resolve_config(given) == given


def test_installed_package_reads_its_own_copies(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = empty_folder / "site-packages" / "tl_lightning"
    for folder in (package / "configs", package.parent / "configs"):  # the second is of another package
        folder.mkdir(parents=True)
        (folder / f"of_{folder.parent.name}.yaml").touch()
    monkeypatch.setattr(shipped_configs, "_PACKAGE", package)
    assert shipped_configs.shipped_configs() == {"of_tl_lightning": package / "configs" / "of_tl_lightning.yaml"}


@pytest.mark.parametrize("words", [["--config=quikstart"], ["--config", "quikstart"], ["-c", "quikstart"]])
def test_unknown_name_lists_the_shipped_ones(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *words])
    assert caught.value.code == 2
    (said, _) = capsys.readouterr().err.splitlines()
    assert "unknown configuration 'quikstart'; did you mean 'quickstart'?" in said
    assert "linear_probe, lp_ft, partial_fine_tuning, quickstart" in said
    assert "give its path with its ending, as --config my.yaml" in said


def test_path_of_the_checkout_points_to_the_shipped_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml"])
    said = (
        "'configs/quickstart.yaml' does not exist; tl-lightning ships a configuration of that name: --config quickstart"
    )
    assert said in capsys.readouterr().err


def test_fit_runs_by_the_bare_name(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"--data.root={photos}", "--data.num_workers=0"]
    main(["fit", "--config=linear_probe", BACKBONE, *data, "--trainer.fast_dev_run=true"])
    assert "LinearProbe on tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_installed_wheel_runs_the_quickstart_in_an_empty_folder(empty_folder: Path) -> None:
    """Up to the plan, with thirty images of noise for the solar cells, whose features take a minute."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, target, here = (empty_folder / name for name in ("wheels", "target", "here"))
    here.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)  # noqa: S603 - our own interpreter
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)  # noqa: S603
    script = here / "run.py"
    script.write_text(
        "import sys\n"
        "import tl_lightning.data.demo as demo\n"
        "from tl_lightning.__main__ import main\n"
        f"sys.path.append({str(ROOT)!r})  # for the images of the tests, after the installed package\n"
        "from tests.doubles import image_folder\n"
        "demo._copy_images = lambda root, classes: image_folder(root, {'defective': 15, 'functional': 15})\n"
        "print('imported from', demo.__file__)\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(target), "XDG_CACHE_HOME": str(empty_folder / "cache")}
    command = [sys.executable, str(script), "fit", "--config", "quickstart", "--trainer.fast_dev_run=true"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert f"imported from {target}" in done.stdout
    assert "LinearProbe on efficientnet_lite0" in done.stdout
