import gc
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tests.doubles import TINY, TinyBackbone, image_folder, save_image
from tests.staged import classifier, images, trainer
from tl_lightning.batch import Batch
from tl_lightning.data import CachedFeaturesDataModule, ImageFolderDataModule
from tl_lightning.modules import LinearProbe


def data(root: Path, **options: Any) -> ImageFolderDataModule:
    defaults: dict[str, Any] = {"num_workers": 0, "preprocessing": TINY}
    return ImageFolderDataModule(str(root), **(defaults | options))


def classes(module: ImageFolderDataModule, split: str) -> Counter[int]:
    return Counter(module.splits[split].targets)


# Splits ---------------------------------------------------------------------------------------------------------------


def test_folder_of_class_folders_is_split_by_class(photos: Path) -> None:
    module = data(photos, val_fraction=0.25, test_fraction=0.25)
    module.setup("fit")
    assert module.class_names == ("ant", "bee", "cat")
    assert classes(module, "test") == Counter({0: 3, 1: 4, 2: 3})
    assert classes(module, "val") == Counter({0: 3, 1: 4, 2: 3})
    files = [file for split in module.splits.values() for file in split.files]
    assert len(files) == len(set(files)) == 41
    for split in module.splits.values():
        assert all(file.startswith(module.class_names[target] + "/") for file, target in zip(*split, strict=True))


def test_split_is_a_function_of_the_seed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data(photos).splits == data(photos, seed=42).splits
    assert data(photos, seed=1).splits != data(photos, seed=2).splits
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert data(photos).splits == data(photos, seed=1).splits


def test_class_of_two_images_still_trains(tmp_path: Path) -> None:
    module = data(image_folder(tmp_path, {"rare": 2, "usual": 30}))
    assert classes(module, "train")[0] == 1
    assert sum(classes(module, split)[0] for split in module.splits) == 2


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        image_folder(tmp_path / split, {"ant": count, "bee": count})
    module = data(tmp_path)
    assert {name: len(samples.files) for name, samples in module.splits.items()} == {"train": 12, "val": 4, "test": 6}


def test_validation_is_split_off_train_without_a_val_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"ant": 10, "bee": 10})
    image_folder(tmp_path / "test", {"bee": 3})
    module = data(tmp_path, val_fraction=0.2)
    assert {name: len(samples.files) for name, samples in module.splits.items()} == {"train": 16, "val": 4, "test": 3}
    assert set(module.splits["test"].targets) == {1}, "a split that lacks a class does not shift the others' numbers"


def test_validation_folder_may_be_called_valid(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        image_folder(tmp_path / split, {"ant": 3, "bee": 3})
    module = data(tmp_path)
    assert "test" not in module.splits
    with pytest.raises(ValueError, match="has 6 images for train, 6 images for val, but none for 'test'; add a"):
        module.setup("test")


def test_split_folders_may_be_in_capitals(tmp_path: Path) -> None:
    for split in ("Training", "Val", "TEST"):
        image_folder(tmp_path / split, {"ant": 3, "bee": 3})
    module = data(tmp_path)
    assert module.class_names == ("ant", "bee")
    assert {name: len(samples.files) for name, samples in module.splits.items()} == {"train": 6, "val": 6, "test": 6}


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    assert data(image_folder(tmp_path, {"train": 5, "bus": 5})).class_names == ("bus", "train")


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    image_folder(tmp_path, {"ant": 3, "bee": 3, ".ipynb_checkpoints": 3, "__MACOSX": 2})
    save_image(tmp_path / "ant" / ".ipynb_checkpoints" / "x.png", 0)
    save_image(tmp_path / "ant" / "._000.png", 0)
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"x")
    module = data(tmp_path)
    assert module.class_names == ("ant", "bee")
    assert sum(len(samples.files) for samples in module.splits.values()) == 6


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    image_folder(tmp_path, {"ant": 3, "bee": 3})
    save_image(tmp_path / "bee" / "garden" / "may" / "x.png", 0)
    assert sum(classes(data(tmp_path), split)[1] for split in ("train", "val", "test")) == 4


# Invalid input --------------------------------------------------------------------------------------------------------


def fit(module: ImageFolderDataModule) -> None:
    _ = module.num_classes
    module.setup("fit")


def test_missing_root_names_similar_folders(photos: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"photoz' does not exist: unknown folder 'photoz'; did you mean 'photos'"
    ):
        fit(data(photos.parent / "photoz"))
    with pytest.raises(FileNotFoundError):
        data(photos.parent / "photoz").setup("predict")
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(data(photos / "ant" / "000.png"))


def test_empty_class_folder_is_refused(tmp_path: Path) -> None:
    image_folder(tmp_path, {"ant": 3, "bee": 3})
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"'.*void' holds no images \(accepted endings: \.bmp.*add images, or remove"):
        fit(data(tmp_path))


@pytest.mark.parametrize(("given", "message"), [({"ant": 3}, "only the class folder 'ant'"), ({}, "no class folders")])
def test_too_few_classes_are_refused(tmp_path: Path, given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; a classifier needs at least two folders"):
        fit(data(image_folder(tmp_path, given)))


def test_images_outside_class_folders_are_counted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match="no class folders and 1 image outside class folders"):
        fit(data(tmp_path))


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        fit(data(tmp_path))
    with pytest.raises(ValueError, match="holds no images to predict"):
        data(tmp_path).setup("predict")


def test_skipped_files_are_counted_by_ending(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"ant": 3, "bee": 3})
    for name in ("ant/a.HEIC", "ant/b.heic", "bee/notes", "bee/Thumbs.db", "bee/.DS_Store", "labels.csv"):
        (root / name).touch()
    with pytest.warns(UserWarning, match=r"are skipped: 2 \.heic, 1 without an ending; convert"):
        _ = data(root).splits
    with pytest.warns(UserWarning, match=r"are skipped: 2 \.heic, 1 \.csv, 1 without an ending; convert"):
        assert len(data(root).predict_files) == 6
    image_folder(tmp_path, {"cat": 1})
    (root / "cat" / "000.png").rename(root / "cat" / "000.heic")
    with pytest.raises(ValueError, match=r"'.*cat' holds no images .*found: 3 \.heic, 1 without an ending\); add"):
        _ = data(root).splits


def test_class_missing_in_train_is_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"ant": 3, "bee": 3})
    image_folder(tmp_path / "val", {"ant": 3, "bees": 3})
    with pytest.raises(ValueError, match=r"unknown class 'bees'; did you mean 'bee'\? train has ant, bee"):
        fit(data(tmp_path))


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    for split in ("val", "test"):
        image_folder(tmp_path / split, {"ant": 3, "bee": 3})
    with pytest.raises(ValueError, match="holds val, test but no 'train' folder"):
        fit(data(tmp_path))


def test_scoring_needs_neither_other_splits_nor_all_classes(tmp_path: Path) -> None:
    """The class names then come from the classifier."""
    image_folder(tmp_path / "test", {"bee": 3, "cat": 2})
    module = data(tmp_path)
    module.class_names = ("ant", "bee", "cat")
    module.setup("test")
    assert module.splits["test"].targets == [1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="has 5 images for test, but none for 'train'"):
        module.setup("fit")
    module = data(tmp_path / "test", test_fraction=1)
    module.class_names = ("ant", "bee", "cat")
    module.setup("test")
    assert module.splits["test"].targets == [1, 1, 1, 2, 2]
    image_folder(tmp_path / "test", {"wasp": 3})
    module = data(tmp_path)
    module.class_names = ("ant", "bee", "cat")
    with pytest.raises(ValueError, match="unknown class 'wasp'"):
        module.setup("test")


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "validation"):
        image_folder(tmp_path / split, {"ant": 3, "bee": 3})
    with pytest.raises(ValueError, match="val and validation, which all mean"):
        fit(data(tmp_path))


def test_missing_preprocessing_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"pass preprocessing=backbone\.preprocessing"):
        ImageFolderDataModule(str(photos)).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave some images for training"),
        ({"test_fraction": 1.1}, "test_fraction is 1.1"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"background": (0, 0, 256)}, "go from 0 to 255"),
    ],
)
def test_options_out_of_range_are_refused(photos: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(photos, **options)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "secret" / "x.png", 0)
    root = image_folder(tmp_path / "photos", {"ant": 3, "bee": 3})
    (root / "ant" / "link.png").symlink_to(tmp_path / "secret" / "x.png")
    with pytest.raises(ValueError, match=r"link\.png' leads out of the data folder"):
        fit(data(root))
    (root / "ant" / "link.png").unlink()
    (root / "wasp").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="wasp' is a link to a folder"):
        fit(data(root))
    (root / "wasp").unlink()
    (root / "ant" / "more").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link to a folder"):
        fit(data(root))


def test_broken_link_is_found_before_training(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"ant": 3, "bee": 3})
    for target in ("gone.png", "link.png"):
        (root / "ant" / "link.png").symlink_to(root / "ant" / target)
        with pytest.raises(ValueError, match=r"link\.png' leads to nothing"):
            fit(data(root))
        (root / "ant" / "link.png").unlink()


def test_link_inside_the_folder_is_an_image(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"ant": 3, "bee": 3})
    (root / "ant" / "link.png").symlink_to(root / "ant" / "000.png")
    assert sum(len(samples.files) for samples in data(root).splits.values()) == 7


# Loading --------------------------------------------------------------------------------------------------------------


def test_augment_option_switches_augmentation(photos: Path) -> None:
    plain, mild = (data(photos, augment=augment).train_dataloader() for augment in (False, True))
    still: list[Tensor] = []
    moving: list[Tensor] = []
    for epoch in (0, 1):
        for each, seen in ((plain, still), (mild, moving)):
            each.sampler.set_epoch(epoch)
            images = {int(i): x for batch in each for i, x in zip(batch.index, batch.inputs, strict=True)}
            seen.append(torch.stack([images[i] for i in sorted(images)]))
    assert torch.equal(*still)
    assert not torch.equal(*moving)
    first = next(iter(data(photos).val_dataloader())).inputs
    assert torch.equal(first, next(iter(data(photos).val_dataloader())).inputs)


def test_prediction_takes_every_image_in_any_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPEG", "sub/deep/c.png", ".hidden/d.png"):
        save_image(tmp_path / name.replace("JPEG", "png"), 0)
    (tmp_path / "a.png").rename(tmp_path / "a.JPEG")
    module = data(tmp_path)
    module.setup("predict")
    assert module.predict_files == ["a.JPEG", "b.png", "sub/deep/c.png"]
    batch = next(iter(module.predict_dataloader()))
    assert batch.index.tolist() == [0, 1, 2]
    assert torch.unique(batch.target).tolist() == [-1]


# Splits of a checkpoint -----------------------------------------------------------------------------------------------


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


def test_interrupted_resume_leaves_no_workers_and_no_position(photos: Path, tmp_path: Path) -> None:
    """Unused loaders end their worker processes, and the position of one run does not reach the next."""
    module = data(photos, num_workers=1, val_fraction=0.3)
    others = set(multiprocessing.active_children())
    for _ in range(2):
        module.setup("fit")
        loader = module.train_dataloader()
        assert len(list(loader)) == len(loader)
        module._resume_position = loader.state_dict() | {"epoch": 0, "batches": 1}
        del loader
    gc.collect()
    assert len(set(multiprocessing.active_children()) - others) == 1, "only the loader in use keeps its worker"
    module.teardown("fit")
    assert set(multiprocessing.active_children()) <= others


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


def test_data_module_survives_pickling(photos: Path) -> None:
    module = data(photos)
    module.setup("fit")
    assert pickle.loads(pickle.dumps(module)).splits == module.splits  # noqa: S301 - our own


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


class Indices(pl.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfit_batches_are_the_same_in_every_epoch(photos: Path, tmp_path: Path) -> None:
    for few, same in ((2, True), (0, False)):
        seen = Indices()
        trainer(tmp_path, seen, max_epochs=2, overfit_batches=few, limit_train_batches=2).fit(
            classifier(), images(photos)
        )
        assert len(seen.seen[0]) == 16
        assert (seen.seen[0] == seen.seen[1]) is same
