"""A folder of images gives classes, splits and samples, or an error that names the folder."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.folders import data
from tests.doubles import image_folder, save_image
from tl_lightning.data import ImageFolderDataModule


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


# Invalid folders ------------------------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match=r"'ant/link\.png' \(the link leads to nothing"):
            fit(data(root))
        (root / "ant" / "link.png").unlink()


def test_link_inside_the_folder_is_an_image(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"ant": 3, "bee": 3})
    (root / "ant" / "link.png").symlink_to(root / "ant" / "000.png")
    assert sum(len(samples.files) for samples in data(root).splits.values()) == 7
