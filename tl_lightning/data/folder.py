"""Find the images and classes of a folder, and split them."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tl_lightning.chance import derive_seed
from tl_lightning.images import SUFFIXES
from tl_lightning.messages import unknown

TRAIN = "train"
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What the folder of a split may be called, in lower or upper case."""


class Samples(NamedTuple):
    """Labelled files."""

    files: list[str]
    """Paths relative to the root, ``/``-separated, sorted."""
    targets: list[int]
    """Class number of each file."""


def find_images(root: Path, folder: Path, others: Counter[str]) -> Iterator[str]:
    """Find the images below a folder, in the same order on every machine.

    Hidden files and folders, and those that archives and file managers leave behind, are passed over.

    Args:
        root: What the paths are relative to, and what they may not lead out of.
        folder: Where to look: ``root`` or a folder in it.
        others: Counts, by their ending, the files that are not taken for images.

    Yields:
        Paths relative to ``root``, ``/``-separated.

    Raises:
        ValueError: A link leads out of the root, or to a folder.
    """
    for path, folders, files in os.walk(_inside(root, folder)):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in folders:
            _no_link(Path(path, name))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if is_hidden(name):
                continue
            if suffix not in SUFFIXES:
                others[suffix] += 1
            else:
                yield _inside(root, Path(path, name)).relative_to(root).as_posix()


def kinds(others: Counter[str]) -> str:
    """List how many files there are of each ending."""
    return ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in others.most_common())


def instead(others: Counter[str]) -> str:
    """Say which endings are taken for images, and which there are instead."""
    return f"({', '.join(sorted(SUFFIXES))})" + (f", but {kinds(others)}" if others else "")


def _inside(root: Path, entry: Path) -> Path:
    if entry.is_symlink() and not entry.exists():
        raise ValueError(f"the link {str(entry)!r} leads nowhere; remove it, or put back what it pointed to")
    if entry.is_symlink() and not entry.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"the link {str(entry)!r} leads out of the data folder, to {str(entry.resolve())!r}; put what it points to into "
            "the folder, or give the folder that holds it as root"
        )
    return entry


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the user's own: ``.ipynb_checkpoints``, ``__MACOSX``, ``Thumbs.db``."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def check_root(root: Path) -> Path:
    """Return the folder if it is one.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: It is a file.
    """
    if not root.exists():
        near = root.parent if root.parent.is_dir() else Path.cwd()
        choice = unknown("folder", root.name, _folders(near), of=repr(str(near)))
        raise FileNotFoundError(f"the data folder {str(root)!r} does not exist: {choice}")
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file; give the folder that holds the images")
    return root


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits by name; nothing where the root holds classes itself.

    Raises:
        ValueError: There are several folders for a split.
    """
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        here = [name for name in _folders(root) if name.lower() in names]
        if len(here) > 1:
            raise ValueError(f"{str(root)!r} holds {' and '.join(here)}, which all mean the split {split!r}; keep one")
        if here:
            found[split] = root / here[0]
    others = [name for name in _folders(root) if root / name not in found.values()]
    if others and not (TRAIN in found and _folders(found[TRAIN])):
        return {}  # a class may be called 'test', or 'train' beside 'bus'
    return found


def _folders(folder: Path) -> list[str]:
    found = sorted((entry for entry in folder.iterdir() if not is_hidden(entry.name)), key=lambda entry: entry.name)
    return [_no_link(entry).name for entry in found if entry.is_dir()]


def _no_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise ValueError(f"{str(folder)!r} is a link to a folder, which is not followed; put the folder itself there")
    return folder


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted.

    Raises:
        ValueError: There is none, or only one.
    """
    names = _folders(folder)
    if len(names) < 2:
        what = f"only the class folder {names[0]!r}" if names else "no class folders"
        loose = sum(1 for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
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
    here = _folders(folder)
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


def stratified_split(
    samples: Samples, class_names: Sequence[str], fractions: dict[str, float], seed: int
) -> dict[str, Samples]:
    """Split every class in the same proportions.

    What a class gives to each part depends on the seed, its own name and its own files alone, so it is the same on
    every rank and machine.

    Args:
        samples: What to split.
        class_names: Names of the classes.
        fractions: Share of each part but ``train``, which gets the rest.
        seed: Seed of the draw.

    Returns:
        The parts by name; each class has at least one sample in ``train``, and in every part if it has enough.
    """
    parts: dict[str, list[int]] = {TRAIN: [], **{name: [] for name in fractions}}
    for target, class_name in enumerate(class_names):
        members = [i for i, other in enumerate(samples.targets) if other == target]
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", class_name))
        drawn = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for name, fraction in fractions.items():
            left = len(drawn) - 1
            share = min(left, max(round(len(members) * fraction), 1 if fraction > 0 else 0))
            parts[name] += drawn[:share]
            drawn = drawn[share:]
        parts[TRAIN] += drawn
    return {
        name: Samples([samples.files[i] for i in sorted(chosen)], [samples.targets[i] for i in sorted(chosen)])
        for name, chosen in parts.items()
    }


def cache_folder() -> Path:
    """Return the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tl_lightning"
