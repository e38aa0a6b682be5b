"""The shards of a store: arrays of rows (``.npy``), each written at once and never changed."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tl_lightning.features.cache_key import file_digest

Shard = npt.NDArray[np.generic]
"""Rows as they lie on disk; bfloat16, which numpy does not know, as integers of 16 bits."""
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}


class DamagedStoreError(ValueError):
    """A file of a store is not what was written."""


def open_shard(path: Path, rows: int, digest: str | None) -> Shard:
    """Map a shard into memory.

    Args:
        path: Its file.
        rows: How many it has.
        digest: SHA-256 of what was written; None where it was looked at before.

    Raises:
        DamagedStoreError: It is missing, or is not what was written.
    """
    its = f"its {rows} row{'s' * (rows > 1)} alone are computed anew"
    if not path.is_file():
        raise DamagedStoreError(f"the shard {str(path)!r} is missing; run again, and {its}")
    if digest is not None and file_digest(path) != digest:
        raise DamagedStoreError(
            f"the shard {str(path)!r} is not what was written, by its SHA-256; remove this file and run again, and {its}"
        )
    shard: Shard = np.load(path, mmap_mode="r", allow_pickle=False)
    return shard


def write_shard(path: Path, rows: Tensor) -> None:
    """Write rows (N, ...) that are on the CPU, in the type in which they are stored, all at once or not at all."""
    array = (rows.contiguous().view(torch.uint16) if rows.dtype == torch.bfloat16 else rows.contiguous()).numpy()

    def write(
        file: IO[bytes],
    ) -> None:  # as numpy.save, which does not say that the disk is full, but how much it wrote
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)

    replace(path, write)


def is_whole(shard: Path, rows: int) -> bool:
    """Return whether a shard is there, and as long as so many rows are."""
    try:
        with shard.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return shape[0] == rows and file.tell() + math.prod(shape) * dtype.itemsize == shard.stat().st_size
    except (OSError, ValueError, IndexError):
        return False


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, all at once or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
