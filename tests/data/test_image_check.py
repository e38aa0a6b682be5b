"""Images that cannot be read are named before training starts, all at once."""

from pathlib import Path

import pytest

from tests.data.folders import data
from tests.doubles import TinyBackbone, image_folder
from tests.staged import trainer
from tl_lightning.data import CachedFeaturesDataModule
from tl_lightning.images import ImageError
from tl_lightning.modules import LinearProbe


def split_folders(root: Path, **bad: int) -> Path:
    """Make split folders with empty files among the images of some splits."""
    for split in ("train", "val", "test"):
        image_folder(root / split, {"ant": 4, "bee": 4})
        for number in range(bad.get(split, 0)):
            (root / split / "ant" / f"bad{number:02d}.png").touch()
    return root


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_image_of_any_split_is_named_before_the_first_step(split: str, cached: bool, tmp_path: Path) -> None:
    root = split_folders(tmp_path / "photos", **{split: 12})
    (root / split / "bee" / "text.jpg").write_text("not an image")
    module = data(root)
    served = CachedFeaturesDataModule(module, cache_dir=str(tmp_path / "cache")) if cached else module
    model = LinearProbe(TinyBackbone(), num_classes=2)
    with pytest.raises(ImageError) as caught:
        trainer(tmp_path, max_epochs=1).fit(model, served)
    message = str(caught.value)
    assert message.startswith(f"13 of 29 images in '{root}' cannot be read: ")
    for number in range(10):
        assert f"'{split}/ant/bad{number:02d}.png' (it is empty)" in message
    assert message.endswith(" and 3 more; repair or remove them")
    assert model.trainer.global_step == 0


def test_only_the_images_that_a_run_uses_are_checked(tmp_path: Path) -> None:
    module = data(split_folders(tmp_path, test=1))
    module.setup("fit")
    with pytest.raises(ImageError, match=r"1 of 9 images .*'test/ant/bad00\.png' \(it is empty\); repair"):
        module.setup("test")


def test_split_without_an_image_is_refused(tmp_path: Path) -> None:
    """A class of two images has one for training and one for validation."""
    module = data(image_folder(tmp_path, {"ant": 2, "bee": 2}))
    module.setup("fit")
    with pytest.raises(
        ValueError, match="has 2 images for train, 2 images for val, but none for 'test'; no class has enough"
    ):
        module.setup("test")
