"""The README's examples and commands run as they stand, and its sentences are short."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.doubles import image_folder, save_image
from tests.ranks import run_on_ranks
from tests.staged import EpochRecorder, images, trainer
from tests.test_configs import random_weights
from tl_lightning import __version__
from tl_lightning.backbones import TorchvisionBackbone
from tl_lightning.callbacks import StagedUnfreezing
from tl_lightning.cli import main
from tl_lightning.utils.hashing import fingerprint

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
SMALL = ["--backbone.name=resnet18", "--backbone.image_size=64", "--trainer.max_epochs=1"]
"""A network with the stages of the default one, but smaller."""
CONTRIBUTING = ROOT.joinpath(".github", "CONTRIBUTING.md").read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def long_sentences(text: str, limit: int = 25) -> list[str]:
    """Return the sentences of a Markdown page, and the cells of its tables, with more words than the limit."""
    for pattern, plain in [(r"```.*?```", "\n\n"), (r"\]\([^)]*\)", "]"), (r"`[^`]*`", "Code")]:
        text = re.sub(pattern, plain, text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )|\|", text)
    sentences = [s for block in blocks for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", block))]
    return [s for s in sentences if len(re.findall(r"[\w'%-]+", s)) > limit]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with images and with the README's module, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", random_weights)
    image_folder(tmp_path / "photos", {"ant": 12, "bee": 12})
    for number in range(6):  # images that no other folder holds
        save_image(tmp_path / "held_out" / ("ant", "bee")[number % 2] / f"{number}.png", seed=9000 + number)
    image_folder(tmp_path / "new_photos", {".": 3})
    tmp_path.joinpath("configs").symlink_to(ROOT / "configs")
    (module,) = (block for block in code_blocks(README, "python") if "class Smoothed" in block)
    tmp_path.joinpath("my_module.py").write_text(module)


def train_example(photos: str, folder: str, world: int) -> dict[str, list[Any]]:
    """Train the subclass and resume it after every epoch."""
    sys.path.insert(0, folder)
    smoothed = importlib.import_module("my_module").Smoothed
    results = {}
    place = Path(folder) / "checkpoints"
    for checkpoint in (None, *(f"epoch-epoch={epoch}.ckpt" for epoch in range(3))):
        torch.manual_seed(1 if checkpoint is None else 99)
        backbone = TorchvisionBackbone("resnet18", weights=None)
        backbone.preprocessing = backbone.preprocessing._replace(size=40, crop=32)
        data = images(photos, batch_size=8 // world, preprocessing=backbone.preprocessing)
        model = smoothed(backbone, num_classes=3, unfreeze_from="layer2", lr=0.01)
        watch = EpochRecorder()
        callbacks: list[pl.Callback] = [StagedUnfreezing({1: "layer4", 2: "layer2"}), watch]
        if checkpoint is None:
            callbacks.append(ModelCheckpoint(place, "epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
        run = trainer(
            folder, *callbacks, devices=world, strategy="ddp", max_epochs=4, enable_checkpointing=checkpoint is None
        )
        resume = None if checkpoint is None else place / checkpoint
        run.fit(model, data, ckpt_path=resume, weights_only=True)
        results[str(checkpoint)] = [fingerprint(model.state_dict()), [list(stages) for stages in watch.trained]]
        if checkpoint is None:
            results["layers"] = [type(module).__name__ for module in model.head]
            again = smoothed.load_from_checkpoint(place / "epoch-epoch=3.ckpt")
            results["loaded"] = [fingerprint(again.state_dict())]
    return results


@pytest.mark.usefixtures("_folder")
def test_subclass_trains_and_resumes_exactly_on_two_ranks(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"photos": str(photos), "folder": str(tmp_path)}
    ranks = run_on_ranks("tests.test_readme", "train_example", tmp_path / "out", **arguments)
    assert ranks[0] == ranks[1]
    whole = ranks[0]["None"]
    assert whole[1] == [[], ["layer4"], ["layer2", "layer4"], ["layer2", "layer4"]], "layer3 stays frozen"
    assert ranks[0]["layers"] == ["LayerNorm", "Linear"]
    assert ranks[0]["loaded"] == [whole[0]]
    for epoch in range(3):
        resumed = ranks[0][f"epoch-epoch={epoch}.ckpt"]
        assert resumed == [whole[0], whole[1][epoch + 1 :]]


@pytest.mark.usefixtures("_folder")
@pytest.mark.filterwarnings("ignore")  # of Lightning, in a script that has not silenced it
def test_scripts_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, script = code_blocks(README, "python")
    assert len(first.splitlines()) <= 12
    for name, code, epochs in [("first.py", first, 5), ("research.py", script, 10)]:
        tmp_path.joinpath(name).write_text(re.sub(r"max_epochs=\d+", "max_epochs=1", code))
        assert f"max_epochs={epochs}" in code
        runpy.run_path(name, run_name="__main__")
    printed = capsys.readouterr().out
    assert "Smoothed on resnet18" in printed, "the plan"
    assert "trained\n" in printed, "the summary"


@pytest.mark.usefixtures("_folder")
def test_commands_run_in_their_order(tmp_path: Path) -> None:
    lines = [line for block in code_blocks(README, "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("tl-lightning")]
    assert len(commands) == 7
    for command in commands:
        options = shlex.split(command.removeprefix("tl-lightning "))
        main([*options, *(SMALL if options[0] in ("fit", "sweep") else [])])
    (predictions,) = tmp_path.joinpath("runs").rglob("predictions.csv")
    assert len(predictions.read_text().splitlines()) == 4
    assert list(tmp_path.joinpath("runs").rglob("sweep.csv"))


@pytest.mark.usefixtures("_folder")
@pytest.mark.filterwarnings("ignore:the learning rates followed a schedule of 1 steps")  # since the length changes
def test_cluster_job_resumes(tmp_path: Path) -> None:
    (line,) = (line for block in code_blocks(README, "bash") for line in block.splitlines() if line.startswith("srun"))
    devices = "--trainer.devices 4 --trainer.num_nodes 2"
    assert devices in line
    options = [*shlex.split(line.replace(devices, "").removeprefix("srun tl-lightning ")), "--backbone.image_size=64"]
    within = "--trainer.callbacks+ ModelCheckpoint --trainer.callbacks.every_n_train_steps 500"
    assert f"`{within}`" in README.replace("\n  ", " ")
    main([*options, *shlex.split(within), "--trainer.max_epochs=1"])
    assert "`--ckpt_path last`" in README
    main([*options, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [path.name for path in tmp_path.joinpath("runs").iterdir()] == ["version_0"]


def test_backbone_of_the_contributing_guide_can_be_cut() -> None:
    (code,) = code_blocks(CONTRIBUTING, "python")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own example
    backbone = names["SmallBackbone"]().eval()
    images = torch.rand(2, 3, 64, 64)
    assert len(backbone.stages) == 2
    for stage in backbone.stages:
        prefix, suffix = backbone.split(stage)
        assert torch.equal(suffix(prefix(images)), backbone(images))


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", "configs/README.md"])
def test_sentences_are_short(page: str) -> None:
    assert long_sentences(ROOT.joinpath(page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", ["README.md", ".github/CONTRIBUTING.md", "configs/README.md"])
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not path.parent.joinpath(link).exists()] == []


def test_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {__version__}\n" in ROOT.joinpath("CITATION.cff").read_text(encoding="utf-8")


def test_layout_names_every_room() -> None:
    (tree,) = (block for block in code_blocks(README, "") if block.startswith("tl_lightning/"))
    rooms = [path.name for path in ROOT.joinpath("tl_lightning").iterdir() if path.joinpath("__init__.py").exists()]
    files = [path.name for path in ROOT.joinpath("tl_lightning").glob("[!_]*.py")]
    assert [name for name in [*(f"{room}/" for room in rooms), *files] if name not in tree] == []
    assert len(tree.splitlines()) <= 10
