"""Find and read the checkpoint that a command names."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from tl_lightning.cli.resume_checks import check_exists, look_at
from tl_lightning.cli.run_folder import find_checkpoint, find_resumable_checkpoint
from tl_lightning.data import images_of
from tl_lightning.modules import TransferClassifier


def read_checkpoint(given: str, root: Path, *, resumes: bool) -> tuple[str, dict[str, Any]]:
    """Find the checkpoint that ``--ckpt_path`` names, and read it with its tensors mapped.

    Args:
        given: A path, or ``best`` or ``last`` of the newest run.
        root: The folder of the runs.
        resumes: Whether the command trains on, so that ``last`` is the newest checkpoint that is not damaged.

    Returns:
        The path, and the content of the file.

    Raises:
        FileNotFoundError: The file does not exist, or no run has such a file.
        ValueError: The file is no checkpoint of this library.
    """
    if given == "last" and resumes:
        path, content = find_resumable_checkpoint(root)
        return str(path), content
    if given in ("last", "best"):
        given = str(find_checkpoint(root, "last" if given == "last" else "best"))
    check_exists(given)
    return given, look_at(given, resumes=resumes)


def load_model(path: str, datamodule: LightningDataModule) -> TransferClassifier:
    """Load the classifier of a checkpoint, and let the data module prepare images as it expects."""
    model = TransferClassifier.load_from_checkpoint(path)
    images = images_of(datamodule)
    if images is not None:
        images.preprocessing = model.backbone.preprocessing
        if model.class_names is not None:
            images.class_names = model.class_names
    return model
