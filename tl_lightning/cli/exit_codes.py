"""Choose the exit code and the message of a command that failed, or leave an unknown failure its traceback.

Exit codes: 2 for a wrong command or configuration, found before the run; 1 for a failed run; 130 for Ctrl-C; 143 for
SIGTERM.
"""

import errno
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from tl_lightning.images import ImageError
from tl_lightning.utils.messages import causes, is_raised_in

WRONG_COMMAND = 2
FAILED_RUN = 1

_PACKAGE = Path(__file__).parents[1]
_LIGHTNING = Path(lightning.__file__).parent
_JSONARGPARSE = Path(jsonargparse.__file__).parent
_LIBRARIES = (_PACKAGE, _LIGHTNING, Path(sysconfig.get_paths()["stdlib"]))

_OF_LIGHTNING = (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError)
_OF_THE_COMMAND = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError)
"""Errors of this package that a wrong command causes, as long as the run has not begun."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")
"""Texts of a full disk in errors of libraries, which lose the number of the error."""
_WHERE = "TL_LIGHTNING_TRACEBACK=1 shows where it was raised"


def explain_failure(error: BaseException, *, has_begun: bool) -> tuple[str, int] | None:
    """Explain an error of a known kind: raised by this package, by Lightning about an option, or by the machine.

    An error is not of a known kind if Python raised it, not a ``raise`` statement, or if code of the user's own took
    part in an error of Lightning or of the machine.

    Args:
        error: The error that ended the command.
        has_begun: Whether the run had begun when the error was raised.

    Returns:
        The message and the exit code; None for an unknown error, whose traceback is needed.
    """
    for link in causes(error):
        if is_raised_in(link, _PACKAGE):
            is_wrong = not has_begun and isinstance(link, _OF_THE_COMMAND) and not isinstance(link, ImageError)
            return str(link), WRONG_COMMAND if is_wrong else FAILED_RUN
        if any(not _is_library(file) for file in _files(link.__traceback__)):
            continue
        reason = _fault_of_machine(link)
        if reason is not None:
            return f"{reason}\n{_WHERE}", FAILED_RUN
        if isinstance(link, _OF_LIGHTNING) and is_raised_in(link, _LIGHTNING):
            text = " ".join(str(link).split())
            return f"{text}\n{_WHERE}", FAILED_RUN if has_begun else WRONG_COMMAND
    reason = _lost_cause(error)
    return None if reason is None else (reason, WRONG_COMMAND)


def _lost_cause(error: BaseException) -> str | None:
    """Return the text of an error that jsonargparse has replaced by its own, because it tried several types.

    Of the errors of all types, jsonargparse keeps the first one and the texts of the others
    (https://github.com/omni-us/jsonargparse/blob/main/jsonargparse/_typehints.py, ``raise_union_unexpected_value``).
    """
    found = re.search(r"any of the Union subtypes\n.*?\nErrors:\n(.*?)\nGiven value type", str(error), re.DOTALL)
    if found is None or not all(is_raised_in(link, _JSONARGPARSE) for link in causes(error)):
        return None
    texts = [" ".join(text.split()) for text in re.split(r"^ *- ", found[1], flags=re.MULTILINE)]
    reasons = [text for text in texts if text and not text.startswith("Expected a ")]
    value = re.search(r"class_path='([\w.]+)'", str(error))
    return f"{value[1]} cannot be built: {'; '.join(reasons)}" if reasons and value else None


def _files(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next


def _is_library(file: str) -> bool:
    """Return whether a file belongs to this package, to an installed one or to Python, and not to the user."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return file.startswith("<") or bool(installed) or any(path.is_relative_to(library) for library in _LIBRARIES)


def _fault_of_machine(error: BaseException) -> str | None:
    """Describe a full disk, missing permission, too little memory or a poor locale; return None for any other error."""
    text = " ".join(str(error).split())
    if (isinstance(error, OSError) and error.errno in _FULL) or any(full in text for full in _FULL_TEXTS):
        return f"the disk is full ({text}): free some space, or write to another disk, then repeat the command"
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        about = f"{error.filename}: " if error.filename else ""
        return f"{about}{error.strerror}. Check the permissions and limits, or give another folder"
    if isinstance(error, UnicodeEncodeError):
        return f"the locale has no encoding for {error.object!r} ({error.reason}): set LC_ALL=C.UTF-8"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return (
            f"out of memory ({text.partition('. ')[0]}): lower data.batch_size, and raise "
            "trainer.accumulate_grad_batches by the same factor to keep the result"
        )
    return None
