"""On the command line, features are computed once: by extract, or by the first run that needs them."""

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tl_lightning.cli import main
from tl_lightning.data import ImageFolderDataModule
from tl_lightning.features import DamagedStoreError, content_keys
from tl_lightning.features._manifest import Block
from tl_lightning.modules import TransferClassifier

TINY = ["--backbone=tests.doubles.TinyBackbone", "--trainer.accelerator=cpu"]
STAGED = [
    "--model=PartialFineTuning",
    "--model.unfreeze_from=layer2",
    "--trainer.max_epochs=3",
    "--trainer.callbacks=StagedUnfreezing",
    "--trainer.callbacks.schedule={1: layer3, 2: layer2, 5: layer2}",
]


def cached(photos: Path, folder: Path, *more: str) -> list[str]:
    data = ["--data=CachedFeaturesDataModule", f"--data.images.root={photos}", "--data.images.num_workers=0"]
    return [
        *TINY,
        *data,
        f"--data.cache_dir={folder / 'cache'}",
        f"--trainer.default_root_dir={folder / 'runs'}",
        *more,
    ]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_extract_leaves_a_fit_nothing_to_compute(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["extract", *cached(photos, tmp_path, *STAGED)])
    text = said(capsys)
    for boundary in (
        "pooled features, 24 float32",
        "activations before layer3, 16 x 2 x 2",
        "activations before layer2, 12 x 4 x 4",
    ):
        assert f"features: caching {boundary}" in text
    assert text.count("features: 41 images in") == 1  # one pass for all boundaries
    assert (
        "cached pooled features, activations before layer3 from epoch 1 on, activations before layer2 from epoch 2 on"
        in text
    )
    assert not (tmp_path / "runs").exists()
    main(["extract", *cached(photos, tmp_path, *STAGED)])
    text = said(capsys)
    assert "images in" not in text
    assert "images 41, all stored and sound" in text

    main(["fit", *cached(photos, tmp_path, *STAGED, "--test_after_fit=true")])
    text = said(capsys)
    assert "images in" not in text
    assert "images 33 train, 4 val, 4 test" in text
    assert "features cached pooled features, activations before layer3 from epoch 1 on" in text
    assert "training images not augmented" in text
    assert "images 4 of 41, drawn by the seed" in text

    run = tmp_path / "runs" / "version_0"
    main(["extract", f"--config={run / 'config.yaml'}"])  # the configuration of a run is one of an extraction
    assert "images in" not in said(capsys)
    main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])
    assert "images 4 of 41, drawn by the seed" in said(capsys)
    main(
        ["predict", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}", f"--data.root={photos}", "--data.num_workers=0"]
    )
    assert "predicted images 41" in said(capsys)


def test_views_are_in_the_plan(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *cached(photos, tmp_path, "--data.views=2", "--trainer.max_epochs=1")])
    text = said(capsys)
    assert "of 8 images" in text
    assert "of 66 images" in text
    assert "2 augmented views of each training image" in text


def test_a_closed_form_head_is_solved_by_the_command_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *cached(photos, tmp_path, "--model=FeatureCacheClassifier")])
    text = said(capsys)
    assert "solved by LogisticRegressionHead, on all features at once" in text
    assert "length 1 epoch" in text
    assert "LogisticRegressionHead: C = " in text
    best = tmp_path / "runs" / "version_0" / "checkpoints" / "best.ckpt"
    assert type(TransferClassifier.load_from_checkpoint(best)).__name__ == "FeatureCacheClassifier"


def test_extract_from_a_data_module_without_a_cache_is_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match=r"--data CachedFeaturesDataModule --data\.images ImageFolderDataModule"):
        main(["extract", *TINY, "--data=ImageFolderDataModule", f"--data.root={photos}"])


@pytest.mark.parametrize("command", ["extract", "sweep"])
def test_data_root_is_answered_with_data_images_root(
    command: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, *TINY, f"--data.root={photos}"])
    assert "Its images have 'root': use --data.images.root" in capsys.readouterr().err


def extract_on_ranks(world: int, photos: str, folder: str) -> int:
    main(["extract", *cached(Path(photos), Path(folder)), f"--trainer.devices={world}", "--trainer.strategy=ddp"])
    return sum(1 for _ in Path(folder, "cache").glob("*/manifest.json"))


def test_two_ranks_extract_into_one_store(photos: Path, tmp_path: Path) -> None:
    assert run_on_ranks(__name__, "extract_on_ranks", tmp_path / "out", photos=str(photos), folder=str(tmp_path)) == [
        1,
        1,
    ]


@pytest.mark.parametrize("command", [["extract"], ["fit", "--test_after_fit=true"]])
def test_a_damaged_shard_is_named_before_anything_is_trained(
    command: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one of test images, which a run reads only after hours of training."""
    monkeypatch.setattr("tl_lightning.features.store.BLOCK", 1)
    main(["extract", *cached(photos, tmp_path)])
    tested = ImageFolderDataModule(str(photos)).splits["test"].files[0]
    key = content_keys([photos / tested])[0]
    (shard,) = (tmp_path / "cache").glob(f"*/{Block(((key, tested),)).file}")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(DamagedStoreError, match=shard.name + ".*only its 1 row will be computed again"):
        main([command[0], *cached(photos, tmp_path, "--trainer.max_epochs=1", *command[1:])])
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))
    shard.unlink()
    main(["extract", *cached(photos, tmp_path)])
    assert shard.read_bytes() == sound


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_cache_dir_that_is_a_file_is_named(below: str, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(OSError, match=r"features cannot be cached in .*file.*give another cache_dir"):
        main(["extract", *cached(photos, tmp_path, f"--data.cache_dir={file}{below}")])
