"""Find image files and subfolders without following links out of the data folder."""

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl_lightning.images import IMAGE_SUFFIXES
from tl_lightning.utils.messages import unknown

_LEFT_BEHIND = (
    *("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", ".AppleDouble", ".thumbnails"),
    *(".git", ".hg", ".svn", ".dvc", ".cache", ".venv", ".Trash", ".Trashes", ".Spotlight-V100", ".fseventsd"),
)
"""Files and folders that archives, file managers and tools leave behind; images in them are copies, or not images."""


@dataclass
class Skipped:
    """Counts the files that a search leaves out, so that they can be named."""

    endings: Counter[str] = field(default_factory=Counter)
    """Files that are not treated as images, by their ending."""
    hidden: dict[str, int] = field(default_factory=dict)
    """Images in hidden folders, by the path of the folder relative to the root."""


def find_images(root: Path, folder: Path, skipped: Skipped) -> Iterator[str]:
    """Find the images below a folder, in the same order on every machine.

    Hidden files and folders are left out, and so are those that archives and file managers leave behind. A file that
    cannot be read, as a link to nothing or a FIFO, is listed too: it is named when it is read.

    Args:
        root: The data folder; paths are relative to it, and links may not lead out of it.
        folder: The folder to search: ``root`` or a folder in it.
        skipped: Counts the files that are left out.

    Yields:
        Paths relative to ``root``, ``/``-separated.

    Raises:
        OSError: A folder cannot be listed.
        ValueError: A link leads out of the root, or to a folder.
    """
    entries = list_folder(folder)
    for entry in entries:
        suffix = Path(entry.name).suffix.lower()
        if is_hidden(entry.name) or is_folder(entry):
            continue
        if suffix not in IMAGE_SUFFIXES:
            skipped.endings[suffix] += 1
        else:
            _refuse_link_out(root, entry)
            yield Path(entry.path).relative_to(root).as_posix()
    _count_hidden(root, entries, skipped)
    for name in _visible_folders(entries):
        yield from find_images(root, folder / name, skipped)


def count_hidden(root: Path, folder: Path, skipped: Skipped) -> None:
    """Count the images in the hidden folders of a folder, without those that tools leave behind."""
    _count_hidden(root, list_folder(folder), skipped)


def _count_hidden(root: Path, entries: Sequence["os.DirEntry[str]"], skipped: Skipped) -> None:
    for entry in entries:
        if is_hidden(entry.name) and entry.name not in _LEFT_BEHIND and entry.is_dir(follow_symlinks=False):
            files = (file for _, _, files in os.walk(entry.path) for file in files)
            count = sum(Path(file).suffix.lower() in IMAGE_SUFFIXES for file in files)
            if count:
                skipped.hidden[Path(entry.path).relative_to(root).as_posix()] = count


def describe_endings(endings: Counter[str]) -> str:
    """List how many files there are with each ending."""
    return ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in endings.most_common())


def describe_hidden(hidden: dict[str, int]) -> str:
    """List hidden folders, with the number of images in each."""
    return ", ".join(f"{folder!r} ({count:,} image{'s' * (count > 1)})" for folder, count in sorted(hidden.items()))


def describe_suffixes(skipped: Skipped) -> str:
    """List the endings of images, and the files with other endings."""
    found = f"; found: {describe_endings(skipped.endings)}" if skipped.endings else ""
    return f"(accepted endings: {', '.join(sorted(IMAGE_SUFFIXES))}{found})"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by a tool: ``.git``, ``__MACOSX``, ``Thumbs.db``."""
    return name.startswith(".") or name in _LEFT_BEHIND


def check_root(root: Path) -> Path:
    """Return the data folder if it exists.

    Raises:
        FileNotFoundError: The folder does not exist.
        NotADirectoryError: The path is that of a file.
        OSError: The path cannot be looked up, as without permission to open the folder above it.
    """
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = root.parent if root.parent.is_dir() else Path.cwd()
        names = _folder_names(near)
        choice = f": {unknown('folder', root.name, names, of=repr(str(near)))}" if names else "; give another one"
        raise FileNotFoundError(f"the data folder {str(root)!r} does not exist{choice}") from None
    except OSError as error:
        raise OSError(f"cannot open the data folder {str(root)!r}: {error.strerror}; {_GIVE_ACCESS}") from error
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file; give the folder that holds the images")
    return root


def _folder_names(folder: Path) -> list[str]:
    """Return the names of folders that may have been meant, and of links to folders; none if they cannot be listed."""
    try:
        return [entry.name for entry in list_folder(folder) if not is_hidden(entry.name) and is_folder(entry)]
    except OSError:
        return []


def subfolders(folder: Path) -> list[str]:
    """Return the names of the visible subfolders, sorted.

    Raises:
        OSError: The folder cannot be listed.
        ValueError: A subfolder is a link.
    """
    return _visible_folders(list_folder(folder))


def _visible_folders(entries: Sequence["os.DirEntry[str]"]) -> list[str]:
    found = [entry for entry in entries if not is_hidden(entry.name) and is_folder(entry)]
    for entry in found:
        if entry.is_symlink():
            raise ValueError(
                f"{entry.path!r} is a link to a folder, and such links are not followed; put the folder itself there"
            )
    return [entry.name for entry in found]


_GIVE_ACCESS = "give yourself access to it (chmod u+rx), or move it out of the data folder"


def list_folder(folder: Path) -> list["os.DirEntry[str]"]:
    """List a folder, sorted by name; ``os.walk`` and ``Path`` would treat one that cannot be read as empty.

    Raises:
        OSError: The folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise OSError(f"cannot list the folder {str(folder)!r}: {error.strerror}; {_GIVE_ACCESS}") from error


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a folder, or a link to one.

    Raises:
        OSError: The file system does not tell.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to itself
            return False
        raise OSError(f"cannot tell whether {entry.path!r} is a folder: {error.strerror}; {_GIVE_ACCESS}") from error


def _refuse_link_out(root: Path, entry: "os.DirEntry[str]") -> None:
    target = Path(os.path.realpath(entry.path))
    if entry.is_symlink() and not target.is_relative_to(os.path.realpath(root)):
        raise ValueError(
            f"the link {entry.path!r} leads out of the data folder, to {str(target)!r}; copy its target into the "
            "folder, or give the folder that holds the target as root"
        )
