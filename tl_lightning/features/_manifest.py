"""The manifest of a store: its cache key, the memory layout of its rows, and the image behind each row."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from tl_lightning.features._shards import DamagedStoreError
from tl_lightning.features.cache_key import DTYPES, FORMAT, CacheKey

MANIFEST = "manifest.json"


class StaleStoreError(ValueError):
    """A store holds rows of another cache key, or of another format."""


class Block(NamedTuple):
    """Rows that are computed together and written to one shard."""

    names: tuple[tuple[str, str], ...]
    """Content key and name of each row; the name serves messages only."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Content key of each row."""
        return tuple(key for key, _ in self.names)

    @property
    def file(self) -> str:
        """Name of the shard, unique to these rows."""
        digest = hashlib.sha256("\n".join(self.keys).encode()).hexdigest()
        return f"{digest[:24]}.npy"


class Layout(NamedTuple):
    """Shape and memory layout of a row, as the backbone made it: in another layout, kernels sum in another order."""

    shape: tuple[int, ...]
    """Shape of a row."""
    channels_last: bool
    """Whether a row (C, h, w) lies in memory as (h, w, C)."""

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Return the layout of rows (N, ...)."""
        last = rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last) and not rows.is_contiguous()
        return cls(tuple(rows.shape[1:]), last)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a row on disk."""
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    def row_bytes(self, dtype: str) -> int:
        """Return the size of a row in a dtype."""
        return torch.Size(self.shape).numel() * DTYPES[dtype].itemsize

    def to_disk(self, rows: Tensor) -> Tensor:
        """Turn rows (N, ...) into the contiguous array that lies on disk."""
        return (rows.permute(0, 2, 3, 1) if self.channels_last else rows).contiguous()

    def from_disk(self, rows: Tensor) -> Tensor:
        """Turn an array from disk into rows (N, ...), without a copy."""
        return rows.permute(0, 3, 1, 2) if self.channels_last else rows


class Manifest(NamedTuple):
    """The content of a complete store."""

    cache_key: CacheKey
    layout: Layout
    digests: dict[Block, str]
    """SHA-256 of each shard."""

    def to_json(self) -> bytes:
        """Return the bytes of the file."""
        shards = [{"file": b.file, "sha256": digest, "rows": b.names} for b, digest in self.digests.items()]
        content = {
            "cache_key": self.cache_key._asdict(),
            "row_shape": self.layout.shape,
            "channels_last": self.layout.channels_last,
            "shards": shards,
        }
        return json.dumps(content, indent=1, sort_keys=True).encode(errors="surrogateescape")


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a store; return None if it has none.

    Raises:
        StaleStoreError: The manifest is of another format.
        DamagedStoreError: The manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        found = int(content["cache_key"]["format"])
        if found == FORMAT:
            shards = content["shards"]
            digests = {Block(tuple((key, name) for key, name in s["rows"])): str(s["sha256"]) for s in shards}
            layout = Layout(tuple(content["row_shape"]), content["channels_last"])
            return Manifest(CacheKey(**content["cache_key"]), layout, digests)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStoreError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); remove its folder and run again: its "
            "rows will be computed again"
        ) from error
    cure = "update tl_lightning, or remove its folder" if found > FORMAT else "remove its folder and run again"
    raise StaleStoreError(f"{str(path)!r} has format {found}, and this version reads format {FORMAT}; {cure}")


def cache_keys_in(cache_dir: str | Path) -> list[CacheKey]:
    """Return the cache keys of all complete stores in a folder; stores that cannot be read are skipped."""
    found = []
    for path in sorted(Path(cache_dir).glob(f"*/{MANIFEST}")):
        with suppress(StaleStoreError, DamagedStoreError, OSError):
            manifest = read_manifest(path.parent)
            if manifest is not None:
                found.append(manifest.cache_key)
    return found
