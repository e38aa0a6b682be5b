"""Find image files and subfolders, without following links out of the data folder."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tl_lightning.images import IMAGE_SUFFIXES
from tl_lightning.utils.messages import unknown


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
            if suffix not in IMAGE_SUFFIXES:
                others[suffix] += 1
            else:
                yield _inside(root, Path(path, name)).relative_to(root).as_posix()


def kinds(others: Counter[str]) -> str:
    """List how many files there are of each ending."""
    return ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in others.most_common())


def instead(others: Counter[str]) -> str:
    """Say which endings are taken for images, and which there are instead."""
    return f"({', '.join(sorted(IMAGE_SUFFIXES))})" + (f", but {kinds(others)}" if others else "")


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
        choice = unknown("folder", root.name, subfolders(near), of=repr(str(near)))
        raise FileNotFoundError(f"the data folder {str(root)!r} does not exist: {choice}")
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file; give the folder that holds the images")
    return root


def subfolders(folder: Path) -> list[str]:
    found = sorted((entry for entry in folder.iterdir() if not is_hidden(entry.name)), key=lambda entry: entry.name)
    return [_no_link(entry).name for entry in found if entry.is_dir()]


def _inside(root: Path, entry: Path) -> Path:
    if entry.is_symlink() and not entry.exists():
        raise ValueError(f"the link {str(entry)!r} leads nowhere; remove it, or put back what it pointed to")
    if entry.is_symlink() and not entry.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"the link {str(entry)!r} leads out of the data folder, to {str(entry.resolve())!r}; put what it points to into "
            "the folder, or give the folder that holds it as root"
        )
    return entry


def _no_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise ValueError(f"{str(folder)!r} is a link to a folder, which is not followed; put the folder itself there")
    return folder
