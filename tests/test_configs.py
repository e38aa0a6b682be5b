"""Every configuration runs, and every documented option is one."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from tests.doubles import image_folder
from tl_lightning.cli import main

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
GUIDE = FOLDER.joinpath("README.md").read_text(encoding="utf-8")


def random_weights(url: str, **kwargs: object) -> dict[str, torch.Tensor]:
    """Return random weights of the shapes that lie at a URL of torchvision, in place of a download."""
    import torchvision

    name = Path(url).name.partition("-")[0].removesuffix("_google")
    options = {"init_weights": False} if name == "inception_v3" else {}  # its initialisation takes a minute
    state: dict[str, torch.Tensor] = torchvision.models.get_model(name, weights=None, **options).state_dict()
    return state


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", random_weights)


@pytest.fixture(autouse=True)
def _few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the 2,624 solar cells, whose features take a minute, by thirty images of noise."""

    def lay_out(root: Path, classes: int) -> None:
        image_folder(root, {"defective": 15, "functional": 15})

    monkeypatch.setattr("tl_lightning.data.demo._copy_images", lay_out)


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configuration_trains_and_predicts(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_folder(tmp_path / "photos", {"ant": 8, "bee": 8})
    short = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    callbacks = yaml.safe_load(config.read_text()).get("trainer", {}).get("callbacks", [])
    staged = [c["init_args"]["schedule"] for c in callbacks if c["class_path"] == "StagedUnfreezing"]
    length = f"--trainer.max_epochs={1 + max((epoch for schedule in staged for epoch in schedule), default=0)}"
    cached = "CachedFeatures" in config.read_text()
    size = "--data.images.batch_size=16" if cached else "--data.init_args.batch_size=4"
    main(["fit", f"--config={config}", *short, length, size])
    (best,) = tmp_path.joinpath("runs").rglob("best.ckpt")
    image_folder(tmp_path / "new", {"x": 3})
    main(["predict", f"--ckpt_path={best}", "--data.root=new", "--trainer.default_root_dir=predicted"])
    (table,) = tmp_path.joinpath("predicted").rglob("predictions.csv")
    assert len(table.read_text().splitlines()) == 4


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configuration_says_how_to_run_it(config: Path) -> None:
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert header[0].endswith("."), "a sentence"
    assert header[-1].startswith(f"#   tl-lightning fit --config {config.stem}"), "a command"
    assert f"| [{config.name}]({config.name}) |" in GUIDE


def option_groups() -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return each group of the guide: the command that it extends, and the options of each row."""
    groups = {}
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", GUIDE, re.DOTALL | re.MULTILINE):
        command = re.search(r"```bash\ntl-lightning (.*)\n```", text)
        assert command is not None, title
        groups[title] = (
            shlex.split(command[1]),
            [shlex.split(row) for row in re.findall(r"^\| `(--.*?)` \|", text, re.MULTILINE)],
        )
    return groups


@pytest.mark.parametrize("title", option_groups())
def test_documented_options_are_accepted(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, rows = option_groups()[title]
    monkeypatch.chdir(tmp_path)
    assert rows
    for options in rows:
        with pytest.raises(SystemExit) as ended:
            main([*command, *options, "--print_config"])
        assert ended.value.code == 0, (options, capsys.readouterr().err)
