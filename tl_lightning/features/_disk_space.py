"""Whether features can be stored, and whether it pays."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tl_lightning.features._manifest import Layout
from tl_lightning.features.cache_key import DTYPES
from tl_lightning.features.store import FeatureStore
from tl_lightning.utils.memory import free_memory

RESIDENT_SHARE = 0.5
"""Of the free memory, that rows may take before they are read from disk instead."""

_MEMORY_RATE = 5_000_000_000  # bytes a second, of one core that copies rows at random
_DISK_RATE = 500_000_000  # bytes a second, of an ordinary solid-state disk
_FASTEST_S = 50e-6  # for an image, of any network on any device
_SPARE_BYTES = 1 << 28  # for manifests, checkpoints and whatever else is written meanwhile


def row_bytes(layout: Layout, dtype: str) -> int:
    """Return the size of a row."""
    return torch.Size(layout.shape).numel() * DTYPES[dtype].itemsize


def check_space(store: FeatureStore, layout: Layout, rows: int) -> None:
    """Make sure that rows fit onto the disk, before the first is computed.

    Raises:
        OSError: They do not.
    """
    needed = rows * row_bytes(layout, store.cache_key.dtype)
    free = free_space(store.folder)
    if needed + _SPARE_BYTES > free:
        size = " x ".join(map(str, layout.shape))
        narrow = store.cache_key.dtype == "float32" and needed // 2 + _SPARE_BYTES <= free
        ways = [
            "another cache_dir",
            *(["dtype='float16'"] * narrow),
            *(["fewer views"] * (store.cache_key.augmentation != "none")),
        ]
        later = ", or a later boundary" * (needed > _SPARE_BYTES)
        raise OSError(
            f"{rows:,} rows of {size} {store.cache_key.dtype} at the boundary {store.cache_key.boundary!r} take {gigabytes(needed)}, and "
            f"{gigabytes(free)} are free in {str(store.folder.parent)!r}, of which {gigabytes(_SPARE_BYTES)} are left to other "
            f"files: give {', '.join(ways)}{later}, or train on the images themselves"
        )


def free_space(folder: Path) -> int:
    """Return how many bytes are free where a folder lies, or will lie."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


def gigabytes(size: int) -> str:
    """Write a number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def advice(layout: Layout, dtype: str, rows: int, seconds: Callable[[], float]) -> str:
    """Say so where reading rows back takes as long as computing them again; else nothing.

    Args:
        layout: Of a row.
        dtype: In which rows are stored.
        rows: How many there are.
        seconds: Measures what the network takes for a row; not called where the answer is plain without.
    """
    size = row_bytes(layout, dtype)
    fits = rows * size <= RESIDENT_SHARE * free_memory(torch.device("cpu"))
    place, rate = ("memory", _MEMORY_RATE) if fits else ("disk, since memory cannot hold them all,", _DISK_RATE)
    reading = size / rate
    if reading <= _FASTEST_S / 2 or reading <= (computing := seconds()) / 2:
        return ""
    return (
        f"this will hardly pay: {gigabytes(size)} an image take {1000 * reading:.2f} ms from {place} at {gigabytes(rate)}/s, and "
        f"the network {1000 * computing:.2f} ms; store a later boundary, or train on the images themselves"
    )
