"""Write files that are replaced whole or not at all."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, force it to the disk, and rename it.

    A process that is killed leaves the previous file as it was, and at most a hidden temporary file beside it. The
    temporary file lies in the same folder, since a rename is atomic only within a file system.

    Args:
        path: The file, in a folder that exists.
        write: Writes the content into an open file.

    Raises:
        OSError: The file cannot be written, as on a full disk; the message names it.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        cause = _system_error(error)
        if cause is None:
            raise
        kept = "the file from before is unchanged" if path.is_file() else "nothing was written"
        failed = OSError(
            f"{str(path)!r} cannot be written ({cause.strerror or cause}); free some space, or give another folder "
            f"({kept})"
        )
        failed.errno = cause.errno
        raise failed from error
    _sync_folder(path.parent)


def _system_error(error: BaseException) -> OSError | None:
    """Return the system's error behind an exception: torch.save raises its own while it handles that of a full disk."""
    link: BaseException | None = error if isinstance(error, (OSError, RuntimeError)) else None
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link


def _sync_folder(folder: Path) -> None:
    """Force the new name of a file to the disk; some network file systems cannot."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
