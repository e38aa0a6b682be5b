"""What lies beside the shards of a store: its manifest, and the response of the network whose rows these are."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from typing_extensions import Self

from tl_lightning.features._shards import DamagedStoreError, replace
from tl_lightning.features.cache_key import FORMAT, CacheKey
from tl_lightning.features.response import Response, is_same

MANIFEST = "manifest.json"
RESPONSE = "response.json"


class StaleStoreError(ValueError):
    """A store holds something else than what is asked for."""


class Block(NamedTuple):
    """Rows that are computed together and lie in one shard."""

    names: tuple[tuple[str, str], ...]
    """Key and name of each row: the key tells the content, the name is for messages."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each row."""
        return tuple(key for key, _ in self.names)

    @property
    def file(self) -> str:
        """Name of the shard, another one for any other rows."""
        digest = hashlib.sha256("\n".join(self.keys).encode()).hexdigest()
        return f"{digest[:24]}.npy"


class Layout(NamedTuple):
    """How a row lies in memory: as the backbone makes it, since kernels compute in another order in another layout."""

    shape: tuple[int, ...]
    """Of a row."""
    channels_last: bool
    """Whether a row (C, h, w) lies as (h, w, C)."""

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Return the layout of rows (N, ...)."""
        last = rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last) and not rows.is_contiguous()
        return cls(tuple(rows.shape[1:]), last)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a row on disk."""
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    def to_disk(self, rows: Tensor) -> Tensor:
        """Bring rows from (N, ...) to what lies on disk."""
        return (rows.permute(0, 2, 3, 1) if self.channels_last else rows).contiguous()

    def from_disk(self, rows: Tensor) -> Tensor:
        """Bring rows from what lies on disk to (N, ...), without a copy."""
        return rows.permute(0, 3, 1, 2) if self.channels_last else rows


class Manifest(NamedTuple):
    """What a store holds."""

    cache_key: CacheKey
    layout: Layout
    digests: dict[Block, str]
    """SHA-256 of each shard."""

    def to_json(self) -> bytes:
        """Return the content of the file."""
        shards = [{"file": b.file, "sha256": digest, "rows": b.names} for b, digest in self.digests.items()]
        content = {
            "cache_key": self.cache_key._asdict(),
            "row_shape": self.layout.shape,
            "channels_last": self.layout.channels_last,
            "shards": shards,
        }
        return json.dumps(content, indent=1, sort_keys=True).encode(errors="surrogateescape")


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a manifest says; None if there is none.

    Raises:
        StaleStoreError: It is of a later format.
        DamagedStoreError: It cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        found = content["cache_key"]["format"]
        if found > FORMAT:
            raise StaleStoreError(
                f"{str(path)!r} was written in the later format {found}; update tl_lightning, or remove it"
            )
        shards = content["shards"]
        digests = {Block(tuple((key, name) for key, name in shard["rows"])): str(shard["sha256"]) for shard in shards}
        layout = Layout(tuple(content["row_shape"]), content["channels_last"])
        return Manifest(CacheKey(**content["cache_key"]), layout, digests)
    except StaleStoreError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStoreError(_cannot_read(path, error)) from error


def read_response(folder: Path) -> Response | None:
    """Return how the network responded whose rows these are; None if there are none.

    Raises:
        DamagedStoreError: The file cannot be read.
    """
    path = folder / RESPONSE
    if not path.is_file():
        return None
    try:
        return tuple(tuple(float(number) for number in row) for row in json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise DamagedStoreError(_cannot_read(path, error)) from error


def claim(folder: Path, response: Response) -> bool:
    """Let rows of a network that responds so be written to a folder, if those that are there already are its own.

    Raises:
        DamagedStoreError: The folder's response cannot be read.
        OSError: Nothing can be written there.
    """
    if (known := read_response(folder)) is not None:
        return is_same(known, response)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock", mode=0o666):  # others may share the folder
        if (known := read_response(folder)) is not None:  # another process was faster
            return is_same(known, response)
        if any(folder.glob("*.npy")) or (folder / MANIFEST).exists():
            return False  # nobody knows whose these are
        folder.mkdir(exist_ok=True)
        text = json.dumps(response).encode()
        replace(folder / RESPONSE, lambda file: file.write(text))
    return True


def cache_keys_in(cache_dir: str | Path) -> list[CacheKey]:
    """Return the cache_keys of all complete stores in a folder; what cannot be read is passed over."""
    found = []
    for path in sorted(Path(cache_dir).glob(f"*/{MANIFEST}")):
        with suppress(StaleStoreError, DamagedStoreError, OSError):
            manifest = read_manifest(path.parent)
            if manifest is not None:
                found.append(manifest.cache_key)
    return found


def _cannot_read(path: Path, error: Exception) -> str:
    return (
        f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); remove its folder and run again, and what was in it "
        "is computed anew"
    )
