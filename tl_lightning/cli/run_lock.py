"""Keep a second run out of the folder of a run, as when one run is resumed twice at once."""

import errno
import fcntl
import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

LOCK_FILE = ".lock"
_IN_USE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

_held: set[int] = set()  # file descriptors


def lock_run_folder(folder: Path) -> int | None:
    """Lock the folder of a run for all processes of a job; rank 0 calls this.

    The lock ends with this process, also when it is killed, because it is an advisory lock of the operating system.
    Its file stays. Where the file system has no such locks, newer versions of ``filelock`` create a marker file
    instead, which a killed process leaves behind (https://github.com/tox-dev/filelock/pull/480).

    Returns:
        The lock, for :func:`unlock_run_folder`; None where the file system has no locks.

    Raises:
        RuntimeError: Another run has locked the folder.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        _warn(folder, error)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _IN_USE:
            _warn(folder, error)
            return None
        raise RuntimeError(
            f"another run is using {str(folder)!r}: wait until it has ended, or end it; to train beside it, start a "
            "new run without --ckpt_path"
        ) from None
    _held.add(descriptor)
    return descriptor


def unlock_run_folder(lock: int | None) -> None:
    """Unlock the folder of a run that has ended."""
    if lock is not None:
        _held.discard(lock)
        os.close(lock)


def _warn(folder: Path, error: OSError) -> None:
    rank_zero_warn(
        f"the folder {str(folder)!r} cannot be locked ({error.strerror}): start no second run in it while this one runs"
    )


def _close_inherited() -> None:
    """Close the locks in a forked worker process, which would keep them when the main process is killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_inherited)
