"""The folders of runs: ``version_0``, ``version_1`` and so on, and what lies in them."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only

from tl_lightning.modules import checkpoint


def claim_folder(root: Path) -> Path:
    """Make the folder ``version_N`` of a new run, which no other run has, and return its absolute path.

    Raises:
        NotADirectoryError: The root is a file.
        OSError: Nothing can be written there.
    """
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"trainer.default_root_dir is {str(root)!r}, a file; give a folder for the runs")
    while True:
        taken = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdigit()]
        folder = root.absolute() / f"version_{max(taken, default=-1) + 1}"
        if getattr(rank_zero_only, "rank", 0) != 0:
            return folder  # only the first process writes
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and root.is_dir():
                continue  # another run was faster
            raise OSError(
                f"trainer.default_root_dir is {str(root)!r}, where no folder can be made ({error.strerror}); give another"
            ) from error
        return folder


_WITHOUT_RESULTS = re.compile(
    r"config\.yaml|hparams\.yaml|metrics\.csv|predictions\.csv\.part|events\.out\.tfevents\..*"
)


def give_back_folder(folder: Path) -> None:
    """Remove the folder of a run that ended before it began, unless something else has been put there."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if getattr(rank_zero_only, "rank", 0) != 0 or not all(_WITHOUT_RESULTS.fullmatch(path.name) for path in found):
        return
    for path in found:
        path.unlink()
    with suppress(OSError):  # somebody else was faster, or has just put something there
        folder.rmdir()


def find_checkpoint(root: Path, name: Literal["best", "last"]) -> Path:
    """Return the checkpoint of that name of the newest run that has one.

    Raises:
        FileNotFoundError: No run has one.
    """
    found = [file for file in root.glob(f"version_*/checkpoints/{name}.ckpt") if file.parts[-3][8:].isdigit()]
    if not found:
        raise FileNotFoundError(f"no run in {str(root.absolute())!r} has a {name}.ckpt; give the path of a checkpoint")
    return max(found, key=lambda file: int(file.parts[-3][8:]))


def newest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]]:
    """Find the checkpoint from which the newest run resumes: the last one written that is not damaged.

    Returns:
        The path, and the content with its tensors mapped, so that the file need not be opened again.

    Raises:
        FileNotFoundError: No run has a checkpoint to resume from, or all checkpoints of the newest run are damaged.
    """
    runs = [run for run in root.glob("version_*") if run.name[8:].isdigit()]
    for run in sorted(runs, key=lambda run: int(run.name[8:]), reverse=True):
        files = [file for file in run.glob("checkpoints/*.ckpt") if file.name not in ("best.ckpt", "probe.ckpt")]
        damaged = None
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
            try:
                content = checkpoint.read(file, mmap=True)
                if content.get("optimizer_states"):
                    return file, content
            except ValueError as error:  # cut short, when the run was killed
                damaged = error
        if damaged is not None:
            raise FileNotFoundError(f"the newest run has nothing to go on from, since {damaged}") from damaged
    raise FileNotFoundError(f"no run in {str(root.absolute())!r} can be gone on with; give the path of a checkpoint")
