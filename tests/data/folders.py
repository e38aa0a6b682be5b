"""Data modules of image folders, for tests."""

from pathlib import Path
from typing import Any

from tests.doubles import TINY
from tl_lightning.data import ImageFolderDataModule


def data(root: Path, **options: Any) -> ImageFolderDataModule:
    """Build the data module of an image folder, without worker processes."""
    defaults: dict[str, Any] = {"num_workers": 0, "preprocessing": TINY}
    return ImageFolderDataModule(str(root), **(defaults | options))
