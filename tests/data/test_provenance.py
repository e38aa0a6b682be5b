"""A checkpoint knows its training images again, and refuses to score them as unseen ones."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image, ImageOps

from tests.data.folders import data
from tests.doubles import TINY, TinyBackbone, image_folder, save_image
from tests.staged import trainer
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.modules import LinearProbe

# A test does not need the callbacks of the training run.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")


def trained(root: Path, folder: Path, seed: int) -> Path:
    return fit_on(data(root, seed=seed), folder)


def fit_on(module: pl.LightningDataModule, folder: Path) -> Path:
    trainer = pl.Trainer(
        max_epochs=1, default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(LinearProbe(TinyBackbone(), num_classes=3), module)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.fixture(scope="module")
def checkpoint(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that was trained on ``photos``, split by seed 1."""
    return trained(photos, tmp_path_factory.mktemp("trained"), seed=1)


def run_test(checkpoint: Path, module: pl.LightningDataModule) -> None:
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(LinearProbe(TinyBackbone(), num_classes=3), module, ckpt_path=checkpoint, verbose=False)


def test_testing_on_training_images_is_refused(photos: Path, checkpoint: Path) -> None:
    run_test(checkpoint, data(photos, seed=1))
    with pytest.raises(ValueError, match="count as unseen: the split was drawn from seed 1 then and from seed 2 now"):
        run_test(checkpoint, data(photos, seed=2))
    with pytest.raises(ValueError, match="the folder is the same, but its split fractions differ"):
        run_test(checkpoint, data(photos, seed=1, test_fraction=0.4))


def test_validation_drawn_from_a_training_folder_is_checked(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos" / "train")
    checkpoint = trained(tmp_path / "photos", tmp_path, seed=1)
    with pytest.raises(ValueError, match="count as unseen: the split was drawn from seed 1 then and from seed 2 now"):
        trainer(tmp_path).validate(
            LinearProbe(TinyBackbone(), num_classes=3), data(tmp_path / "photos", seed=2), ckpt_path=checkpoint
        )


def test_training_images_are_recognised_in_other_data_modules(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    class Mine(ImageFolderDataModule):
        pass

    stored = CachedFeaturesDataModule(data(photos, seed=1), cache_dir=str(tmp_path / "features"))
    for each in (checkpoint, fit_on(stored, tmp_path)):
        for serves in (ImageFolderDataModule, Mine):
            run_test(each, serves(str(photos), preprocessing=TINY, seed=1))
            with pytest.raises(ValueError, match="would count as unseen: the split was drawn from seed 1"):
                run_test(each, serves(str(photos), preprocessing=TINY, seed=2))
        run_test(each, OwnData(photos))


class OwnData(pl.LightningDataModule):
    """A data module of a user, with a state of its own."""

    def __init__(self, photos: Path) -> None:
        super().__init__()
        self.images = data(photos)

    def test_dataloader(self) -> object:
        return self.images.test_dataloader()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _ = state_dict["position"]


@pytest.mark.parametrize("change", ["removed", "added", "renamed"])
def test_training_images_are_recognised_after_the_folder_has_changed(
    change: str, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(photos, changed)
    first = min((changed / "ant").iterdir())
    if change == "removed":
        first.unlink()
    elif change == "added":
        save_image(changed / "ant" / "new.png", seed=99)
    else:
        first.rename(first.with_name("zzz.png"))
    for seed in (1, 2, 3):
        with pytest.raises(ValueError, match=r"was trained on \d+ of these \d+ images of .*would count as unseen"):
            run_test(checkpoint, data(changed, seed=seed, test_fraction=0.5))


def test_copy_of_the_folder_is_recognised(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "copy")
    run_test(checkpoint, data(tmp_path / "copy", seed=1))
    with pytest.raises(ValueError, match="would count as unseen"):
        run_test(checkpoint, data(tmp_path / "copy", seed=2))


def test_file_names_that_are_not_unicode_do_not_stop_a_run(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", {"ant": 6, "bee": 6, "cat": 6})
    for name in ("ant", "bee", "cat"):
        for image in (root / name).iterdir():
            image.rename(os.fsdecode(os.fsencode(image)[:-4] + b"\xff.png"))
    trained(root, tmp_path, seed=1)


def test_testing_on_another_folder_is_allowed(photos: Path, tmp_path: Path) -> None:
    """Its images have the names and sizes of the training images, as with photos from the same camera."""
    first, other = tmp_path / "first", tmp_path / "other"
    for image in photos.rglob("*.png"):
        for root, change in ((first, ImageOps.mirror), (other, ImageOps.invert)):
            with Image.open(image) as opened:
                made = root / image.relative_to(photos).with_suffix(".bmp")
                made.parent.mkdir(parents=True, exist_ok=True)
                change(opened).save(made)
    run_test(trained(first, tmp_path, seed=1), data(other, seed=2))


def test_resuming_on_other_images_is_refused(photos: Path, checkpoint: Path) -> None:
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="a resumed run would not be the same run"):
        trainer.fit(LinearProbe(TinyBackbone(), num_classes=3), data(photos, seed=2), ckpt_path=checkpoint)


def resume(root: Path, checkpoint: Path, **options: Any) -> None:
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(LinearProbe(TinyBackbone(), num_classes=3), data(root, seed=1, **options), ckpt_path=checkpoint)


def invert(image: Path) -> None:
    with Image.open(image) as opened:
        changed = ImageOps.invert(opened.convert("RGB"))
    changed.save(image)


def test_resuming_on_overwritten_images_is_refused_and_they_are_named(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A run on cached features is the same run, so it is refused too."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    resume(root, checkpoint)  # the folder has moved with equal content
    trained_on = data(root, seed=1).splits["train"].files
    invert(root / trained_on[3])
    with pytest.raises(ValueError, match=rf"the content of 1 of the {len(trained_on)} training .*: {trained_on[3]}\. "):
        resume(root, checkpoint)
    for image in root.rglob("*.png"):
        invert(image)
    said = rf"the content of {len(trained_on) - 1} of the {len(trained_on)} .*: {trained_on[0]}, .* and \d+ more\. "
    with pytest.raises(ValueError, match=said):
        resume(root, checkpoint)
    stored = CachedFeaturesDataModule(data(root, seed=1), cache_dir=str(tmp_path / "features"))
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(LinearProbe(TinyBackbone(), num_classes=3), stored, ckpt_path=checkpoint)


def test_resuming_on_another_folder_with_the_same_names_is_refused(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = image_folder(tmp_path / "other", {"cat": 13, "ant": 12, "bee": 16})  # other pixels under the same names
    with pytest.raises(ValueError, match=r"the content of \d+ of the \d+ training images .* has changed"):
        resume(other, checkpoint)


def test_checkpoint_of_an_earlier_version_without_image_ids_resumes(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["ImageFolderDataModule"]["images"]["each"]
    torch.save(content, tmp_path / "older.ckpt")
    resume(photos, tmp_path / "older.ckpt")
