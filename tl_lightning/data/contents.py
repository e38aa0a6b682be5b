"""What a folder of images holds: classes, splits and images."""

import functools
from collections import Counter
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from tl_lightning.data import folder as folders
from tl_lightning.data.folder import Samples
from tl_lightning.images import SUFFIXES


class FolderContents:
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
        root = folders.check_root(self.root)
        given = folders.split_folders(root)
        if given and folders.TRAIN not in given:
            raise ValueError(f"{str(root)!r} holds {', '.join(p.name for p in given.values())} but no 'train' folder")
        return tuple(folders.class_folders(given.get(folders.TRAIN, root)))

    @functools.cached_property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each split that there is: ``train``, ``val``, ``test``.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: A class without images, a class that ``train`` does not know, or too few images.
        """
        root, names = folders.check_root(self.root), self.class_names
        given = folders.split_folders(root)
        undivided = {"test" if self.test_fraction == 1 else folders.TRAIN: root}
        others: Counter[str] = Counter()
        found = {
            split: folders.find_samples(root, folder, names, others, complete=split == folders.TRAIN)
            for split, folder in (given or undivided).items()
        }
        self._warn_of(others)
        if folders.TRAIN not in found:
            return found
        fractions = {}
        if "val" not in given:
            fractions["val"] = self.val_fraction
        if not given and self.test_fraction > 0:
            fractions["test"] = self.test_fraction
        found |= folders.stratified_split(found[folders.TRAIN], names, fractions, self.seed)
        if not found["val"].files:
            raise ValueError(f"{str(root)!r} holds one image per class, which leaves none for validation; add images")
        return found

    @property
    def num_images(self) -> int:
        """Number of labelled images, of all splits."""
        return sum(len(samples.files) for samples in self.splits.values())

    def is_drawn(self, split: str) -> bool:
        """Return whether a split was drawn from the seed, rather than given by a folder or as all images."""
        return split not in folders.split_folders(self.root) and len(self.splits) > 1

    @functools.cached_property
    def images(self) -> list[str]:
        """Paths, relative to the root, of all images below it, in whatever folders.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are no images.
        """
        root = folders.check_root(self.root)
        others: Counter[str] = Counter()
        files = sorted(folders.find_images(root, root, others))
        if not files:
            raise ValueError(f"{str(root)!r} holds no images to predict {folders.instead(others)}")
        self._warn_of(others)
        return files

    def _warn_of(self, others: Counter[str]) -> None:
        """Name the files that are not taken for images: they may be photos of a kind that cannot be read."""
        if others:
            rank_zero_warn(
                f"{str(self.root)!r} holds files that are not taken for images, and are passed over: "
                f"{folders.kinds(others)}; convert those that are images to one of {', '.join(sorted(SUFFIXES))}"
            )
