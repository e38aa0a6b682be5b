"""Compare the size of features with the free disk space and the free memory."""

import shutil
from pathlib import Path

import torch

from tl_lightning.features._manifest import Layout
from tl_lightning.features.rows import RESIDENT_SHARE
from tl_lightning.features.store import FeatureStore
from tl_lightning.utils.memory import free_memory

_SPARE_BYTES = 1 << 28  # left for manifests, checkpoints and other files written meanwhile


def check_space(store: FeatureStore, layout: Layout, rows: int) -> None:
    """Make sure that rows fit on the disk, before the first is computed.

    Raises:
        OSError: They do not fit.
    """
    dtype = store.cache_key.dtype
    needed = rows * layout.row_bytes(dtype)
    free = free_space(store.folder)
    if needed + _SPARE_BYTES <= free:
        return
    shape = " x ".join(map(str, layout.shape))
    narrower = dtype == "float32" and needed // 2 + _SPARE_BYTES <= free
    ways = [
        "another cache_dir",
        *(["dtype='float16'"] * narrower),
        *(["fewer views"] * (store.cache_key.augmentation != "none")),
    ]
    later = ", or a later boundary" * (needed > _SPARE_BYTES)
    raise OSError(
        f"{rows:,} rows of {shape} {dtype} at the boundary {store.cache_key.boundary!r} take {gigabytes(needed)}, and "
        f"{gigabytes(free)} are free in {str(store.folder.parent)!r}, where {gigabytes(_SPARE_BYTES)} are kept for "
        f"other files: give {', '.join(ways)}{later}, or train on the images themselves"
    )


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder lies or will lie."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


def gigabytes(size: int) -> str:
    """Write a number of bytes in a unit that fits."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def warn_of_large_rows(layout: Layout, dtype: str, rows: int, image_bytes: int, device: torch.device) -> str:
    """Warn of rows that are read from disk in each epoch and are large; otherwise return an empty string.

    Args:
        layout: The layout of a row.
        dtype: The dtype of the cached rows.
        rows: The number of rows of all splits.
        image_bytes: Size of an image that the network takes, with 8 bits per channel.
        device: The device that rows are served on.
    """
    # By bytes alone: a time measured here says little about the machine's load in training. Rows in memory are read
    # once, which always pays. Rows on disk are read in each epoch. Where they are larger than the pixels that they are
    # computed from, reading them can take longer than computing them.
    size = layout.row_bytes(dtype)
    if size <= image_bytes or rows * size <= RESIDENT_SHARE * free_memory(device):
        return ""
    return (
        f"this may not pay: memory cannot hold these features, so each epoch reads {gigabytes(rows * size)} from disk, "
        f"and a row of {gigabytes(size)} is larger than the {gigabytes(image_bytes)} of pixels that it is computed "
        "from; cache a later boundary, or train on the images themselves"
    )
