"""List the classes, splits and images of a folder."""

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.data._files import (
    Skipped,
    check_root,
    count_hidden,
    describe_endings,
    describe_hidden,
    describe_suffixes,
    find_images,
    list_folder,
    subfolders,
)
from tl_lightning.data.splits import SPLIT_FOLDERS, TRAIN, Samples, stratified_split
from tl_lightning.images import IMAGE_SUFFIXES
from tl_lightning.utils.messages import unknown


class FolderIndex:
    """Search a folder of images once, at the first access to one of the properties.

    Args:
        root: The folder.
        val_fraction: Share of all labelled images for validation, if there is no folder for that split.
        test_fraction: Share of all labelled images for testing, if there are no split folders; 1 takes all images.
        seed: Seed of the split.
    """

    def __init__(self, root: Path, val_fraction: float, test_fraction: float, seed: int) -> None:
        self.root = root
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers: the folders in ``train``, sorted.

        If some classes or the training images are missing, set them to the class names of the classifier to be scored.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are fewer than two class folders, or split folders without ``train``.
        """
        root = check_root(self.root)
        given = split_folders(root)
        if given and TRAIN not in given:
            raise ValueError(
                f"{str(root)!r} holds {', '.join(p.name for p in given.values())} but no 'train' folder; add one"
            )
        return tuple(class_folders(given.get(TRAIN, root)))

    @functools.cached_property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each split that exists: ``train``, ``val``, ``test``.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: A class has no images or is missing in ``train``, or there are too few images.
        """
        root, names = check_root(self.root), self.class_names
        given = split_folders(root)
        unsplit = {"test" if self.test_fraction == 1 else TRAIN: root}
        skipped = Skipped()
        count_hidden(root, root, skipped)
        found = {
            split: find_samples(root, folder, names, skipped, require_all_classes=split == TRAIN)
            for split, folder in (given or unsplit).items()
        }
        self._warn_about(skipped)
        if TRAIN not in found:
            return found
        fractions = {}
        if "val" not in given:
            fractions["val"] = self.val_fraction
        if not given and self.test_fraction > 0:
            fractions["test"] = self.test_fraction
        found |= stratified_split(found[TRAIN], names, fractions, self.seed)
        if not found["val"].files:
            raise ValueError(f"{str(root)!r} holds one image per class, which leaves none for validation; add images")
        return found

    def require(self, split: str) -> None:
        """Make sure that a split has images.

        Raises:
            ValueError: It has none.
        """
        if split in self.splits and self.splits[split].files:
            return
        counts = {name: len(samples.files) for name, samples in self.splits.items() if samples.files}
        found = ", ".join(f"{count} images for {name}" for name, count in counts.items())
        remedy = "no class has enough for every split, so add images"
        if split not in self.splits:
            fraction = "val_fraction" if split == "val" else "test_fraction"
            remedy = f"add a folder {split!r}, or, without split folders, set {fraction}"
        raise ValueError(f"{str(self.root)!r} has {found}, but none for {split!r}; {remedy}")

    @property
    def num_images(self) -> int:
        """Number of labelled images in all splits."""
        return sum(len(samples.files) for samples in self.splits.values())

    def is_random_split(self, split: str) -> bool:
        """Return whether a split was drawn at random, rather than given by a folder or made of all images."""
        return split not in split_folders(self.root) and len(self.splits) > 1

    @functools.cached_property
    def images(self) -> list[str]:
        """Paths, relative to the root, of all images below it, in any folder.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are no images.
        """
        root = check_root(self.root)
        skipped = Skipped()
        files = sorted(find_images(root, root, skipped))
        if not files:
            raise ValueError(f"{str(root)!r} holds no images to predict {describe_suffixes(skipped)}")
        self._warn_about(skipped)
        return files

    def _warn_about(self, skipped: Skipped) -> None:
        """Name the files with other endings, since they may be photos in a format that cannot be read."""
        if skipped.endings:
            rank_zero_warn(
                f"{str(self.root)!r} holds files that are not treated as images and are skipped: "
                f"{describe_endings(skipped.endings)}; convert images among them to one of "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if skipped.hidden:
            rank_zero_warn(
                f"{str(self.root)!r} holds hidden folders, whose images are skipped: "
                f"{describe_hidden(skipped.hidden)}; rename them to use the images, or remove them"
            )


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits by name; an empty dict if the root itself holds the class folders.

    Raises:
        ValueError: There are several folders for one split.
    """
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        here = [name for name in subfolders(root) if name.lower() in names]
        if len(here) > 1:
            raise ValueError(f"{str(root)!r} holds {' and '.join(here)}, which all mean the split {split!r}; keep one")
        if here:
            found[split] = root / here[0]
    others = [name for name in subfolders(root) if root / name not in found.values()]
    if others and not (TRAIN in found and subfolders(found[TRAIN])):
        return {}  # a class may be called 'test', or 'train' beside 'bus'
    return found


def class_name_of(folder: str) -> str:
    """Return the class that a folder is named after: its name in composed Unicode (NFC).

    Archives from a Mac hold names decomposed, ``e`` and an accent instead of one letter, which look the same.
    """
    return unicodedata.normalize("NFC", folder)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the classes that have folders, sorted.

    Raises:
        ValueError: There are fewer than two.
    """
    names = sorted({class_name_of(name) for name in subfolders(folder)})
    if len(names) < 2:
        found = f"only the class folder {names[0]!r}" if names else "no class folders"
        loose = sum(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in list_folder(folder))
        beside = f" and {loose} image{'s' * (loose > 1)} outside class folders" if loose else ""
        raise ValueError(
            f"{str(folder)!r} holds {found}{beside}; a classifier needs at least two folders, each named after a class "
            "and holding its images (or 'train', 'val' and 'test' folders of such class folders)"
        )
    return names


def find_samples(
    root: Path, folder: Path, class_names: Sequence[str], skipped: Skipped, *, require_all_classes: bool
) -> Samples:
    """Find the labelled images of a folder of class folders.

    Folders whose names differ only by composed and decomposed Unicode hold images of one class.

    Args:
        root: The data folder; paths are relative to it.
        folder: The folder that holds the class folders: ``root`` or one of its split folders.
        class_names: Names of the classes, in the order of their numbers.
        skipped: Counts the files that are left out.
        require_all_classes: Refuse class folders without images.

    Raises:
        OSError: A folder cannot be listed.
        ValueError: A folder is not named after a class, or images are missing.
    """
    count_hidden(root, folder, skipped)
    numbers = {class_name_of(name): number for number, name in enumerate(class_names)}
    numbers |= {name: number for number, name in enumerate(class_names)}  # an earlier version told both forms apart
    folders: dict[int, list[str]] = {}
    for name in subfolders(folder):
        number = numbers.get(name, numbers.get(class_name_of(name)))
        if number is None:
            raise ValueError(
                f"{str(folder)!r}: {unknown('class', name, class_names, of='train')}; every class needs training "
                "images, so rename the folder or add the class to 'train'"
            )
        folders.setdefault(number, []).append(name)
    files: list[str] = []
    targets: list[int] = []
    for target, name in ((number, name) for number in sorted(folders) for name in folders[number]):
        images = list(find_images(root, folder / name, skipped))
        if not images and require_all_classes:
            raise ValueError(
                f"the class folder {str(folder / name)!r} holds no images {describe_suffixes(skipped)}; add images, or "
                "remove the folder"
            )
        files += images
        targets += [target] * len(images)
    if not files:
        raise ValueError(f"{str(folder)!r} holds no images in folders named after classes {describe_suffixes(skipped)}")
    return Samples(files, targets)
