"""Whether features can be stored, and whether it pays."""

import shutil
from pathlib import Path

import torch

from tl_lightning.features.files import Layout
from tl_lightning.features.recipe import DTYPES
from tl_lightning.features.store import FeatureStore

_SPARE_BYTES = 1 << 28  # for manifests, checkpoints and whatever else is written meanwhile


def row_bytes(layout: Layout, dtype: str) -> int:
    """Return the size of a row."""
    return torch.Size(layout.shape).numel() * DTYPES[dtype].itemsize


def check_space(store: FeatureStore, layout: Layout, rows: int) -> None:
    """Make sure that rows fit onto the disk, before the first is computed.

    Raises:
        OSError: They do not.
    """
    needed = rows * row_bytes(layout, store.recipe.dtype)
    free = shutil.disk_usage(existing(store.folder)).free
    if needed + _SPARE_BYTES > free:
        size = " x ".join(map(str, layout.shape))
        raise OSError(
            f"{rows:,} rows of {size} {store.recipe.dtype} at the boundary {store.recipe.boundary!r} take {gigabytes(needed)}, and "
            f"{gigabytes(free)} are free in {str(store.folder.parent)!r}: give another cache_dir, dtype='float16', fewer views or "
            "a later boundary, or train on the images themselves"
        )


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def gigabytes(size: int) -> str:
    """Write a number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
