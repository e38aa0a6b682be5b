"""A checkpoint that does not exist, is damaged, is not trusted or does not fit is refused with advice."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import BACKBONE, PARTIAL, Run, fit, on_cpu
from tests.doubles import image_folder
from tl_lightning.cli import main
from tl_lightning.cli.resume_checks import check_exists, check_trusted_classes


def test_missing_checkpoint_lists_the_ones_nearby(short: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short.folder.parent.parent)
    folder = Path("runs/version_0/checkpoints")
    for path, said in (
        (
            folder / "bst.ckpt",
            f"does not exist; did you mean 'best.ckpt' or 'last.ckpt'? {folder} has best.ckpt, last.ckpt",
        ),
        (
            folder.parent,
            f"is the folder '{folder.parent}'; give one of its checkpoints: {folder}/best.ckpt, {folder}/last.ckpt",
        ),
        (Path("runs") / "best.ckpt", "does not exist; the folder 'runs' contains no checkpoint"),
        (Path("nowhere") / "best.ckpt", "does not exist; the folder 'nowhere' does not exist"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            check_exists(path)
        assert said in str(caught.value)


def test_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is the folder .*; it contains no checkpoint"):
        check_exists(tmp_path)


@pytest.mark.parametrize("command", ["test", "validate", "predict", "fit"])
def test_every_command_refuses_a_checkpoint_that_does_not_exist(command: str, photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the checkpoint 'none\.ckpt' does not exist"):
        main([command, f"--data.root={photos}", "--ckpt_path=none.ckpt"])


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_file_that_is_damaged_or_no_checkpoint_is_named(command: str, photos: Path, short: Run, tmp_path: Path) -> None:
    whole = short.last.read_bytes()
    for number, content in enumerate((b"", whole[:5000], whole[:-500], b"\x89PNG\r\n\x1a\n" + bytes(99))):
        file = tmp_path / f"{number}.ckpt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{number}.ckpt' cannot be read safely"):
            main([command, f"--data.root={photos}", f"--ckpt_path={file}"])


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_flipped_bit_is_refused_and_a_sound_checkpoint_is_named(
    command: str, photos: Path, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(short.folder, tmp_path / "runs" / "version_0"))
    content = bytearray(short.last.read_bytes())
    content[len(content) // 2] ^= 1
    Path("checkpoints/last.ckpt").write_bytes(content)
    before = contents(tmp_path)
    options = [BACKBONE, *PARTIAL, "--trainer.max_epochs=2"] if command == "fit" else []
    given = [command, *on_cpu(photos, tmp_path / "runs"), "--ckpt_path=checkpoints/last.ckpt"]
    with pytest.raises(ValueError, match=r"Bad CRC-32 .*sound checkpoint there is 'checkpoints/best\.ckpt'$"):
        main([*given, *options])
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_untrusted_classes_are_listed_with_the_options_that_trust_them(short: Run) -> None:
    def described(name: str, **init_args: Any) -> dict[str, Any]:
        return {"class_path": f"my_absent_module.{name}", "init_args": init_args, "args": []}

    model = described("Probe", head=described("Head")) | {"backbone": described("Net")}
    with pytest.raises(ValueError, match=r"names the class 'my_absent_module\.Probe'") as caught:
        check_trusted_classes(short.last, {"tl_lightning": {"model": model}})
    names = "--model my_absent_module.Probe --backbone my_absent_module.Net --model.head my_absent_module.Head"
    assert f"add {names} or --config {short.folder / 'config.yaml'}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model=LinearProbe"], "model: PartialFineTuning in the checkpoint, LinearProbe now"),
        (
            ["--backbone=TorchvisionBackbone", "--backbone.name=resnet18", "--backbone.weights=null", *PARTIAL],
            "backbone: TinyBackbone in the checkpoint, TorchvisionBackbone now",
        ),
        (
            ["--backbone=tests.doubles.TinyBackbone", *PARTIAL, "--backbone.dropout=0.1"],
            "backbone.dropout: 0.3 in the checkpoint, 0.1 now",
        ),
        ([*PARTIAL, "--model.unfreeze_from=layer3"], "model.unfreeze_from: 'layer2' in the checkpoint, 'layer3' now"),
        ([*PARTIAL, "--model.head=MLPHead"], "model.head: None in the checkpoint, MLPHead"),
    ],
)
def test_another_model_does_not_resume(
    options: list[str], said: str, photos: Path, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short.folder.parent.parent)
    with pytest.raises(ValueError, match="was trained with another model") as caught:
        fit(photos, tmp_path, "--ckpt_path=runs/version_0/checkpoints/last.ckpt", *options)
    message = str(caught.value)
    assert said in message
    assert f"--config {Path('runs/version_0/config.yaml')}" in message
    assert len(message.splitlines()) < 6
    assert not list(tmp_path.iterdir())


def test_other_classes_do_not_resume(short: Run, tmp_path: Path) -> None:
    more = image_folder(tmp_path / "photos", {"ant": 12, "bee": 16, "cat": 13, "dog": 12})
    with pytest.raises(ValueError, match="was trained with another model") as caught:
        fit(more, tmp_path, f"--ckpt_path={short.last}", *PARTIAL)
    said = "classes of the data: 3 (ant, bee, cat) in the checkpoint, 4 (ant, bee, cat and 1 more) now"
    assert said in str(caught.value)


def test_fewer_epochs_than_the_checkpoint_has_completed_are_refused(trained: Run, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has completed 15 epochs, but trainer.max_epochs is 1: give at least 15"):
        fit(photos, tmp_path, f"--ckpt_path={trained.last}", "--data.val_fraction=0.3")
