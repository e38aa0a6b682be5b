"""Images for the tests of callbacks: three training batches of four, half as many as elsewhere."""

from pathlib import Path
from typing import Any

from tests import staged
from tl_lightning.data import ImageFolderDataModule

PHOTOS = {"ant": 7, "bee": 8, "cat": 6}


def images(photos: str | Path, **options: Any) -> ImageFolderDataModule:
    return staged.images(photos, **({"batch_size": 4} | options))
