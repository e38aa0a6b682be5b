"""Read and write the shards of a store: arrays of rows (``.npy``), each written at once and never changed."""

import hashlib
import math
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tl_lightning.utils.files import write_atomically

Shard = npt.NDArray[np.generic]
"""Rows as they lie on disk; bfloat16, which numpy lacks, as 16-bit integers."""
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}

_CHUNK_BYTES = 1 << 20


class DamagedStoreError(ValueError):
    """A file of a store is missing or differs from the one that was written."""


def open_shard(path: Path, rows: int, digest: str | None) -> Shard:
    """Map a shard into memory.

    Args:
        path: The file of the shard.
        rows: The number of its rows.
        digest: SHA-256 of the file that was written; None skips the check.

    Raises:
        DamagedStoreError: The file is missing or differs from the one that was written.
    """
    only = f"only its {rows} row{'s' * (rows > 1)} will be computed again"
    if not path.is_file():
        raise DamagedStoreError(f"the shard {str(path)!r} is missing; run again: {only}")
    if digest is not None and file_digest(path) != digest:
        raise DamagedStoreError(
            f"the shard {str(path)!r} is damaged: its SHA-256 is not that of the file that was written. Remove this "
            f"file and run again: {only}"
        )
    shard: Shard = np.load(path, mmap_mode="r", allow_pickle=False)
    return shard


def write_shard(path: Path, rows: Tensor) -> None:
    """Write rows (N, ...) on the CPU, in the dtype of the store, all at once or not at all."""
    array = (rows.contiguous().view(torch.uint16) if rows.dtype == torch.bfloat16 else rows.contiguous()).numpy()

    def write(file: IO[bytes]) -> None:
        # As numpy.save, which on a full disk raises without the system's error: only how many bytes it wrote.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)

    write_atomically(path, write)


def is_whole(shard: Path, rows: int) -> bool:
    """Return whether the file of a shard exists and is as long as its number of rows requires."""
    try:
        with shard.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return shape[0] == rows and file.tell() + math.prod(shape) * dtype.itemsize == shard.stat().st_size
    except (OSError, ValueError, IndexError):
        return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
