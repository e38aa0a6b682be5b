"""A checkpoint alone restores a classifier; damaged, foreign and unsafe files are refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.doubles import DropoutProbe, TinyBackbone, image_folder
from tl_lightning.backbones import TorchvisionBackbone
from tl_lightning.cli import main
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.modules import LinearProbe, TransferClassifier
from tl_lightning.utils.hashing import fingerprint


def run_python(code: str, *args: object) -> str:
    result = subprocess.run(  # noqa: S603 - runs this interpreter on code of this file
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(3)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def train_in_python(root: Path, folder: Path, weights: Path) -> Path:
    backbone = TorchvisionBackbone("resnet18", weights=str(weights))
    data = ImageFolderDataModule(str(root), num_workers=0, preprocessing=backbone.preprocessing)
    model = LinearProbe(backbone, num_classes=data.num_classes)
    trainer = pl.Trainer(max_epochs=1, default_root_dir=folder, logger=False, enable_progress_bar=False)
    trainer.fit(model, data)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    return Path(trainer.checkpoint_callback.best_model_path)


def train_by_cli(root: Path, folder: Path, weights: Path) -> Path:
    main(
        [
            "fit",
            "--backbone=TorchvisionBackbone",
            "--backbone.name=resnet18",
            f"--backbone.weights={weights}",
            "--data=ImageFolderDataModule",
            f"--data.root={root}",
            "--data.num_workers=0",
            "--model=LinearProbe",
            "--trainer.max_epochs=1",
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false",
        ]
    )
    return folder / "version_0" / "checkpoints" / "best.ckpt"


FRESH_PROCESS = """
import sys, torch, torch.hub, urllib.request, socket
def refuse(*args, **kwargs): raise AssertionError("a download was attempted")
urllib.request.urlopen = torch.hub.load_state_dict_from_url = torch.hub.download_url_to_file = refuse
socket.create_connection = refuse
import huggingface_hub
huggingface_hub.hf_hub_download = refuse
loads = []
load = torch.load
def recorded(*args, **kwargs):
    loads.append(kwargs.get("weights_only"))
    return load(*args, **kwargs)
torch.load = recorded
import torchvision.models._api as api
api.load_state_dict_from_url = refuse
from tl_lightning.modules import LinearProbe
model = LinearProbe.load_from_checkpoint(sys.argv[1])
assert loads == [True], loads
images = load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save({"logits": model(images)}, sys.argv[3])
print(",".join(model.class_names), model.backbone.preprocessing, model.training)
"""


@pytest.mark.parametrize("train", [train_in_python, train_by_cli])
def test_checkpoint_alone_restores_the_logits_in_a_fresh_process(
    train: Callable[[Path, Path, Path], Path], photos: Path, tmp_path: Path, weights_file: Path
) -> None:
    weights = tmp_path / "resnet18.pth"
    shutil.copy(weights_file, weights)
    checkpoint = train(photos, tmp_path / "run", weights)
    images = torch.randn(3, 3, 224, 224)
    torch.save(images, tmp_path / "images.pt")
    model = TransferClassifier.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        logits = model(images)
    weights.unlink()
    printed = run_python(FRESH_PROCESS, checkpoint, tmp_path / "images.pt", tmp_path / "logits.pt")
    assert printed.startswith("ant,bee,cat Preprocessing(size=256, crop=224")
    assert printed.strip().endswith("False")
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True)["logits"], logits)


def test_loaded_classifier_gives_the_logits_from_before_saving(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone(seed=5)
    data = ImageFolderDataModule(str(photos), num_workers=0, preprocessing=backbone.preprocessing)
    model = DropoutProbe(backbone, 3)
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LinearProbe.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(again) is DropoutProbe
    assert not again.training
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    assert again.class_names == ("ant", "bee", "cat")
    assert again.backbone.preprocessing == backbone.preprocessing


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = LinearProbe(TinyBackbone(), num_classes=2, class_names=["a", "b"])
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    return tmp_path / "plain.ckpt"


def edited(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    edit(content)
    torch.save(content, checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "not a subclass of torch.nn.Module"),
        ("this.Model", "a checkpoint may name classes of tl_lightning, torch, torchvision, timm, and of modules"),
        ("tl_lightning.nothing.Model", "cannot be imported"),
    ],
)
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_class_that_a_checkpoint_may_not_name_is_refused(checkpoint: Path, path: str, message: str, part: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        model = content["tl_lightning"]["model"]
        (model if part == "model" else model["backbone"])["class_path"] = path

    with pytest.raises(ValueError, match=message):
        TransferClassifier.load_from_checkpoint(edited(checkpoint, edit))
    assert "this" not in sys.modules, "the module was imported, which runs its code, before the class was refused"


def test_changed_backbone_weights_are_refused(checkpoint: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"]["backbone.model.layer1.conv.weight"][0, 0, 0, 0] += 1e-6

    with pytest.raises(ValueError, match="not the saved ones"):
        LinearProbe.load_from_checkpoint(edited(checkpoint, edit))


def test_checkpoint_that_lacks_a_parameter_is_refused(checkpoint: Path) -> None:
    def edit(content: dict[str, Any]) -> None:  # as if the code had gained a parameter since
        del content["state_dict"]["head.linear.bias"]
        head = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith("head.")}
        content["tl_lightning"]["hashes"]["head"] = fingerprint(head)

    with pytest.raises(ValueError, match=r"missing \['head.linear.bias'\]"):
        LinearProbe.load_from_checkpoint(edited(checkpoint, edit))


def test_checkpoint_of_a_later_format_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="in a later format; update tl_lightning"):
        LinearProbe.load_from_checkpoint(edited(checkpoint, lambda c: c["tl_lightning"].update(format=99)))


def test_missing_files_and_other_files_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt' does not exist"):
        LinearProbe.load_from_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("x")
    with pytest.raises(ValueError, match="cannot be read safely"):
        LinearProbe.load_from_checkpoint(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of tl_lightning"):
        LinearProbe.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"which is no DropoutProbe; load it with LinearProbe\.load_from_checkpoint"):
        DropoutProbe.load_from_checkpoint(checkpoint)


def test_damaged_checkpoints_are_refused_and_the_damage_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(ValueError, match=r"empty\.ckpt' cannot be read safely \(EOFError.*damaged, cut short"):
        LinearProbe.load_from_checkpoint(tmp_path / "empty.ckpt")
    whole = checkpoint.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.ckpt' cannot be read safely"):
        LinearProbe.load_from_checkpoint(tmp_path / "half.ckpt")
    for edit, message in (
        (lambda c: c["tl_lightning"].pop("hashes"), "damaged: it lacks hashes"),
        (lambda c: c.pop("state_dict"), "damaged: it lacks its weights"),
        (lambda c: c["state_dict"]["head.linear.bias"].add_(1), "the weights of the head in .* are not the saved ones"),
        (
            lambda c: c["tl_lightning"]["model"]["init_args"].update(num_classes=5),
            "model.num_classes is 5, but there are 2 names for its classes",
        ),
        (lambda c: c["tl_lightning"]["model"]["init_args"].update(lr=0.0), r"does not fit .* \(ValueError: lr is 0"),
        (
            lambda c: c["tl_lightning"]["model"]["init_args"].update(colour=1),
            "`model.colour` is not an argument of LinearProbe",
        ),
        (lambda c: c["tl_lightning"].update(class_names=["a", "b", "c"]), "there are 3 names for its classes"),
    ):
        checkpoint.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            LinearProbe.load_from_checkpoint(edited(checkpoint, edit))


def test_class_of_a_script_is_refused_with_advice(checkpoint: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["tl_lightning"]["model"]["class_path"] = "__main__.MyProbe"

    with pytest.raises(ValueError, match=r"'MyProbe', which was defined in the script.*put the class into a module"):
        LinearProbe.load_from_checkpoint(edited(checkpoint, edit))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_checkpoint_of_another_precision_loads(precision: Any, photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    data = ImageFolderDataModule(str(photos), num_workers=0, preprocessing=backbone.preprocessing)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, precision=precision, **quiet)  # type: ignore[arg-type]  # all values are bool
    model = LinearProbe(backbone, num_classes=3)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LinearProbe.load_from_checkpoint(tmp_path / "a.ckpt")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(again(images), model.float().eval()(images), atol=1e-5)


def test_trainer_restores_a_checkpoint_with_weights_only(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    root = image_folder(tmp_path / "two", {"a": 9, "b": 9})
    data = ImageFolderDataModule(str(root), num_workers=0, preprocessing=backbone.preprocessing)
    trainer = pl.Trainer(logger=False, enable_progress_bar=False)
    model = LinearProbe(backbone, num_classes=2)
    trainer.test(model, data, ckpt_path=checkpoint, weights_only=True, verbose=False)


def test_training_a_loaded_classifier_without_its_optimizer_is_refused(photos: Path, tmp_path: Path) -> None:
    backbone = TinyBackbone()
    data = ImageFolderDataModule(str(photos), num_workers=0, preprocessing=backbone.preprocessing)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, **quiet)  # type: ignore[arg-type]  # all values are bool
    trainer.fit(LinearProbe(backbone, num_classes=3, optimizer=torch.optim.SGD), data)
    trainer.save_checkpoint(tmp_path / "sgd.ckpt")
    again = LinearProbe.load_from_checkpoint(tmp_path / "sgd.ckpt")
    with pytest.raises(ValueError, match="cannot restore its optimizer; to train on, build the classifier with them"):
        pl.Trainer(max_epochs=2, **quiet).fit(again, data)  # type: ignore[arg-type]  # all values are bool
