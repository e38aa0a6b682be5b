"""Classes, splits and images of a folder."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.data._files import check_root, find_images, instead, kinds, subfolders
from tl_lightning.data.splits import SPLIT_FOLDERS, TRAIN, Samples, stratified_split
from tl_lightning.images import IMAGE_SUFFIXES
from tl_lightning.utils.messages import unknown


class FolderIndex:
    """Look at a folder of images once, when something is asked of it.

    Args:
        root: The folder.
        val_fraction: Share of all labelled images that is split off for validation where no folder gives it.
        test_fraction: Share of all labelled images that is split off for testing where no folder gives any split; 1 takes
            all of them.
        seed: Seed of the split.
    """

    def __init__(self, root: Path, val_fraction: float, test_fraction: float, seed: int) -> None:
        self.root = root
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers: the folders of ``train``.

        To score a classifier on images of which some classes, or the training images, are missing, set them to its own.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are fewer than two class folders, or folders for other splits than ``train`` alone.
        """
        root = check_root(self.root)
        given = split_folders(root)
        if given and TRAIN not in given:
            raise ValueError(f"{str(root)!r} holds {', '.join(p.name for p in given.values())} but no 'train' folder")
        return tuple(class_folders(given.get(TRAIN, root)))

    @functools.cached_property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each split that there is: ``train``, ``val``, ``test``.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: A class without images, a class that ``train`` does not know, or too few images.
        """
        root, names = check_root(self.root), self.class_names
        given = split_folders(root)
        undivided = {"test" if self.test_fraction == 1 else TRAIN: root}
        others: Counter[str] = Counter()
        found = {
            split: find_samples(root, folder, names, others, complete=split == TRAIN)
            for split, folder in (given or undivided).items()
        }
        self._warn_of(others)
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

    @property
    def num_images(self) -> int:
        """Number of labelled images, of all splits."""
        return sum(len(samples.files) for samples in self.splits.values())

    def is_drawn(self, split: str) -> bool:
        """Return whether a split was drawn from the seed, rather than given by a folder or as all images."""
        return split not in split_folders(self.root) and len(self.splits) > 1

    @functools.cached_property
    def images(self) -> list[str]:
        """Paths, relative to the root, of all images below it, in whatever folders.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are no images.
        """
        root = check_root(self.root)
        others: Counter[str] = Counter()
        files = sorted(find_images(root, root, others))
        if not files:
            raise ValueError(f"{str(root)!r} holds no images to predict {instead(others)}")
        self._warn_of(others)
        return files

    def _warn_of(self, others: Counter[str]) -> None:
        """Name the files that are not taken for images: they may be photos of a kind that cannot be read."""
        if others:
            rank_zero_warn(
                f"{str(self.root)!r} holds files that are not taken for images, and are passed over: "
                f"{kinds(others)}; convert those that are images to one of {', '.join(sorted(IMAGE_SUFFIXES))}"
            )


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits by name; nothing where the root holds classes itself.

    Raises:
        ValueError: There are several folders for a split.
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


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted.

    Raises:
        ValueError: There is none, or only one.
    """
    names = subfolders(folder)
    if len(names) < 2:
        what = f"only the class folder {names[0]!r}" if names else "no class folders"
        loose = sum(1 for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        raise ValueError(
            f"{str(folder)!r} holds {what}{f' and {loose} loose images' if loose else ''}; a classifier needs at least two "
            "folders, each named after a class and holding its images (or 'train', 'val' and 'test' folders of such)"
        )
    return names


def find_samples(
    root: Path, folder: Path, class_names: Sequence[str], others: Counter[str], *, complete: bool
) -> Samples:
    """Find the labelled images of a folder of class folders.

    Args:
        root: What the paths are relative to.
        folder: Holds the class folders; ``root``, or one of its split folders.
        class_names: The classes, in the order of their numbers.
        others: Counts, by their ending, the files that are not taken for images.
        complete: Every class folder must hold an image.

    Raises:
        ValueError: There are folders of other classes, or no images of some class that should have them.
    """
    here = subfolders(folder)
    for name in here:
        if name not in class_names:
            raise ValueError(
                f"{str(folder)!r}: {unknown('class', name, class_names, of='train')}; every class must be there in training, "
                "so rename the folder or add the class to 'train'"
            )
    files: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(class_names):
        images = list(find_images(root, folder / name, others)) if name in here else []
        if not images and complete and name in here:
            raise ValueError(
                f"the class folder {str(folder / name)!r} holds no images {instead(others)}; add images, or remove the folder"
            )
        files += images
        targets += [target] * len(images)
    if not files:
        raise ValueError(f"{str(folder)!r} holds no images in folders named after classes {instead(others)}")
    return Samples(files, targets)
