"""Create and find the folders of runs, ``version_0``, ``version_1`` and so on, and the checkpoints in them."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from tl_lightning.modules import checkpoint
from tl_lightning.utils.paths import short_path

_PREFIX = "version_"
_WITHOUT_RESULTS = re.compile(
    r"\.lock|config\.yaml|hparams\.yaml|metrics\.csv|predictions\.csv\.part|events\.out\.tfevents\..*"
)
_NOT_RESUMABLE = ("best.ckpt", "probe.ckpt")  # copies of an earlier epoch


def create_run_folder(root: Path) -> Path:
    """Create the folder of a new run, which no other run uses, and return its absolute path.

    Raises:
        NotADirectoryError: The root is a file.
        OSError: No folder can be created there.
    """
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"trainer.default_root_dir is the file {str(root)!r}; give a folder for the runs")
    while True:
        numbers = [_number(run) for run in _runs(root)]
        folder = root.absolute() / f"{_PREFIX}{max(numbers, default=-1) + 1}"
        if getattr(rank_zero_only, "rank", 0) != 0:
            return folder  # only rank 0 writes
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and root.is_dir():
                continue  # another run was faster
            raise type(error)(
                f"trainer.default_root_dir is {str(root)!r}, where no folder can be created ({error.strerror}); give "
                "another folder"
            ) from error
        return folder


def remove_run_folder(folder: Path) -> None:
    """Remove the folder of a run that ended before it began, unless it contains other files than those of a start."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if getattr(rank_zero_only, "rank", 0) != 0 or not all(_WITHOUT_RESULTS.fullmatch(path.name) for path in found):
        return
    for path in found:
        path.unlink()
    with suppress(OSError):  # another process has removed the folder, or has just put a file there
        folder.rmdir()


def find_checkpoint(root: Path, name: Literal["best", "last"]) -> Path:
    """Return the checkpoint of this name in the newest run that has one.

    Raises:
        FileNotFoundError: No run has one.
    """
    for run in _newest_first(root):
        file = run / "checkpoints" / f"{name}.ckpt"
        if file.exists():
            return file
    raise FileNotFoundError(f"no run in {str(root.absolute())!r} has a {name}.ckpt; give the path of a checkpoint")


def find_resumable_checkpoint(root: Path) -> tuple[Path, dict[str, Any]]:
    """Find the checkpoint from which the newest run resumes: the last one written that is not damaged.

    Returns:
        The path, and the content with its tensors mapped, so that the file need not be opened again.

    Raises:
        FileNotFoundError: No run has a checkpoint to resume from, or all checkpoints of the newest run are damaged.
    """
    for run in _newest_first(root):
        files = [file for file in run.glob("checkpoints/*.ckpt") if file.name not in _NOT_RESUMABLE]
        damage = None
        for file in checkpoint.newest_first(files):
            try:
                checkpoint.check_checksums(file)
                content = checkpoint.read(file, mmap=True)
            except (ValueError, OSError) as error:
                damage = damage or error
                continue
            if content.get("optimizer_states"):
                if damage is not None:
                    rank_zero_warn(f"{damage}. The run resumes from {short_path(file)}, the newest sound checkpoint")
                return file, content
        if damage is not None:  # rather than resume another run
            raise FileNotFoundError(f"the newest run cannot be resumed: {damage}") from damage
    raise FileNotFoundError(f"no run in {str(root.absolute())!r} can be resumed; give the path of a checkpoint")


def _runs(root: Path) -> list[Path]:
    return [run for run in root.glob(f"{_PREFIX}*") if run.name.removeprefix(_PREFIX).isdigit()]


def _number(run: Path) -> int:
    return int(run.name.removeprefix(_PREFIX))


def _newest_first(root: Path) -> list[Path]:
    return sorted(_runs(root), key=_number, reverse=True)
