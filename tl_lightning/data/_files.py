"""Find image files and subfolders without following links out of the data folder."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tl_lightning.images import IMAGE_SUFFIXES
from tl_lightning.utils.messages import unknown


def find_images(root: Path, folder: Path, skipped: Counter[str]) -> Iterator[str]:
    """Find the images below a folder, in the same order on every machine.

    Hidden files and folders are left out, and so are those that archives and file managers leave behind.

    Args:
        root: The data folder; paths are relative to it, and links may not lead out of it.
        folder: The folder to search: ``root`` or a folder in it.
        skipped: Counts the files that are not treated as images, by their ending.

    Yields:
        Paths relative to ``root``, ``/``-separated.

    Raises:
        ValueError: A link leads out of the root, to a folder, or to nothing.
    """
    for path, folders, files in os.walk(_checked_link(root, folder)):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in folders:
            _refuse_folder_link(Path(path, name))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if is_hidden(name):
                continue
            if suffix not in IMAGE_SUFFIXES:
                skipped[suffix] += 1
            else:
                yield _checked_link(root, Path(path, name)).relative_to(root).as_posix()


def describe_skipped(skipped: Counter[str]) -> str:
    """List how many files there are with each ending."""
    return ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in skipped.most_common())


def describe_suffixes(skipped: Counter[str]) -> str:
    """List the endings of images, and the files with other endings."""
    found = f"; found: {describe_skipped(skipped)}" if skipped else ""
    return f"(accepted endings: {', '.join(sorted(IMAGE_SUFFIXES))}{found})"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder was not made by the user: ``.ipynb_checkpoints``, ``__MACOSX``, ``Thumbs.db``."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def check_root(root: Path) -> Path:
    """Return the data folder if it exists.

    Raises:
        FileNotFoundError: The folder does not exist.
        NotADirectoryError: The path is that of a file.
    """
    if not root.exists():
        near = root.parent if root.parent.is_dir() else Path.cwd()
        choice = unknown("folder", root.name, subfolders(near), of=repr(str(near)))
        raise FileNotFoundError(f"the data folder {str(root)!r} does not exist: {choice}")
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file; give the folder that holds the images")
    return root


def subfolders(folder: Path) -> list[str]:
    """Return the names of the visible subfolders, sorted.

    Raises:
        ValueError: A subfolder is a link.
    """
    found = sorted((entry for entry in folder.iterdir() if not is_hidden(entry.name)), key=lambda entry: entry.name)
    return [_refuse_folder_link(entry).name for entry in found if entry.is_dir()]


def _checked_link(root: Path, entry: Path) -> Path:
    if entry.is_symlink() and not entry.exists():
        raise ValueError(f"the link {str(entry)!r} leads to nothing; remove it, or restore its target")
    if entry.is_symlink() and not entry.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"the link {str(entry)!r} leads out of the data folder, to {str(entry.resolve())!r}; copy its target into "
            "the folder, or give the folder that holds the target as root"
        )
    return entry


def _refuse_folder_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise ValueError(
            f"{str(folder)!r} is a link to a folder, and such links are not followed; put the folder itself there"
        )
    return folder
