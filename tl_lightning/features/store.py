"""Features, or activations at any boundary, on disk: computed once, read by the content of the image.

A store is a folder with shards, arrays of rows (``.npy``), and a manifest that says which row stands for which image. A
shard is written under a temporary name, flushed and renamed, and the manifest is replaced last, so that whatever is killed
when, a reader sees a complete store or none. Shards never change; new rows go into new ones.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from tl_lightning.features._manifest import (
    MANIFEST,
    Block,
    Layout,
    Manifest,
    StaleStoreError,
    claim,
    read_manifest,
    read_response,
)
from tl_lightning.features._shards import NUMPY, Shard, is_whole, open_shard, replace, write_shard
from tl_lightning.features.cache_key import DTYPES, CacheKey, file_digest
from tl_lightning.features.response import Response, is_same

BLOCK = 256
"""Rows of a shard. Which rows are computed together never depends on ranks, restarts or the batch size."""


class FeatureStore:
    """Rows of one cache_key, by the content of the image.

    Args:
        folder: Where the store lies, or will lie.
        cache_key: What the rows depend on.

    Raises:
        StaleStoreError: The folder holds rows of another cache_key, or of a later format; the message names what differs.
        DamagedStoreError: The manifest, or the response, cannot be read.
    """

    def __init__(self, folder: str | Path, cache_key: CacheKey) -> None:
        self.folder = Path(folder)
        self.cache_key = cache_key
        self.layout: Layout | None = None
        """How rows lie; None while there are none."""
        self.blocks: tuple[Block, ...] = ()
        self.response: Response | None = None
        """Of the network whose rows these are; None before the first."""
        self._digests: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._sound: set[str] = set()
        self.reload()

    @property
    def lock(self) -> FileLock:
        """Held by whoever writes."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder.with_name(f"{self.folder.name}.lock"), mode=0o666)

    def reload(self) -> None:
        """Look at the manifest again, to which another run may have added.

        Raises:
            StaleStoreError: It is of another cache_key, or of a later format.
            DamagedStoreError: It cannot be read.
        """
        self.response = read_response(self.folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            self.layout, self.blocks, self._digests, self._places = None, (), {}, {}
            return
        if manifest.cache_key != self.cache_key:
            differences = "; ".join(self.cache_key.differences(manifest.cache_key))
            raise StaleStoreError(f"the stored features in {str(self.folder)!r} do not fit: {differences}")
        self.layout = manifest.layout
        self.blocks = tuple(manifest.digests)
        self._digests = {block.file: digest for block, digest in manifest.digests.items()}
        self._places = {
            key: (number, row) for number, block in enumerate(self.blocks) for row, key in enumerate(block.keys)
        }

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        """Return whether there is a row."""
        return key in self._places

    # Reading --------------------------------------------------------------------------------------------------------

    def shards_of(self, keys: Sequence[str]) -> dict[int, Shard]:
        """Map the shards that hold these rows into memory, each as it lies on disk, after looking whether it is sound.

        Raises:
            KeyError: A row is not stored.
            DamagedStoreError: A shard is missing, or is not what was written.
        """
        return {number: self._shard(number) for number in sorted({self._places[key][0] for key in keys})}

    def check(self, keys: Sequence[str], share: slice = slice(None)) -> None:
        """Look whether the shards that hold these rows are sound, or whether a share of these shards is.

        Raises:
            DamagedStoreError: A shard is missing, or is not what was written.
        """
        for number in sorted({self._places[key][0] for key in keys})[share]:
            self._shard(number)

    def place(self, key: str) -> tuple[int, int]:
        """Return the shard of a row, and its place in it."""
        return self._places[key]

    def read(self, keys: Sequence[str]) -> Tensor:
        """Read rows into memory.

        Args:
            keys: Of the rows wanted, in any order.

        Returns:
            (N, ...), in the store's type.

        Raises:
            KeyError: A row is not stored.
            DamagedStoreError: A shard is missing, or is not what was written.
        """
        rows = self.read_as_stored(keys)
        return rows if self.layout is None else self.layout.from_disk(rows)

    def read_as_stored(self, keys: Sequence[str]) -> Tensor:
        """Read rows into memory, as they lie on disk; see :class:`Layout`."""
        shards = self.shards_of(keys)
        dtype = DTYPES[self.cache_key.dtype]
        shape = () if self.layout is None else self.layout.stored_shape
        rows = np.empty((len(keys), *shape), NUMPY[dtype])
        wanted: dict[int, tuple[list[int], list[int]]] = {number: ([], []) for number in shards}
        for position, key in enumerate(keys):
            number, row = self._places[key]
            wanted[number][0].append(position)
            wanted[number][1].append(row)
        for number, (positions, places) in wanted.items():
            rows[positions] = shards[number][places]
        return torch.from_numpy(rows).view(dtype)

    def _shard(self, number: int) -> Shard:
        block = self.blocks[number]
        digest = None if block.file in self._sound else self._digests[block.file]
        shard = open_shard(self.folder / block.file, len(block.names), digest)
        self._sound.add(block.file)
        return shard

    def fits(self, response: Response) -> bool:
        """Return whether rows of a network that responds so belong here."""
        return not self.blocks if self.response is None else is_same(self.response, response)

    # Writing --------------------------------------------------------------------------------------------------------

    def claim(self, response: Response) -> None:
        """Note how the network responds whose rows are to be written, before the first of them is.

        Raises:
            StaleStoreError: Another one wrote here.
        """
        if not claim(self.folder, response):
            raise StaleStoreError(
                f"the stored features in {str(self.folder)!r} do not fit: what the network makes of a test pattern was other, "
                "by other code of its own or of a library; take the folder that folder_for gives"
            )
        self.response = response

    def plan(self, names: Mapping[str, str]) -> list[Block]:
        """Divide rows into blocks: stored ones stay as they are, all others follow in their order.

        Args:
            names: Of the rows wanted, by key.

        Returns:
            All blocks that the store then has.
        """
        kept = [b for b in self.blocks if self.is_written(b) or all(key in names for key in b.keys)]
        known = {key for block in kept for key in block.keys}
        new = [(key, name) for key, name in names.items() if key not in known]
        return kept + [Block(tuple(new[i : i + BLOCK])) for i in range(0, len(new), BLOCK)]

    def is_written(self, block: Block) -> bool:
        """Return whether the shard of a block is there, with all its rows."""
        return is_whole(self.folder / block.file, len(block.names))

    def write(self, block: Block, rows: Tensor) -> float:
        """Write the rows of a block, all at once or not at all.

        Args:
            block: Which rows these are.
            rows: (N, ...), on the CPU, as they lie on disk; see :meth:`Layout.to_disk`.

        Returns:
            The error by the store's type: the norm of the difference over the norm.

        Raises:
            ValueError: The store's type cannot hold a number.
        """
        narrow = rows.to(DTYPES[self.cache_key.dtype])
        if not torch.isfinite(narrow).all():
            cause = "are not finite" if not torch.isfinite(rows).all() else f"go beyond {self.cache_key.dtype}"
            raise ValueError(
                f"activations at the boundary {self.cache_key.boundary!r} {cause}, up to {rows.abs().max():.3g}: store them as "
                "float32 or bfloat16, and look at the weights if they are not finite"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_shard(self.folder / block.file, narrow)
        if narrow.dtype == rows.dtype:
            return 0.0
        return float((narrow.to(rows.dtype) - rows).norm() / rows.norm().clamp_min(1e-30))

    def finish(self, blocks: Sequence[Block], written: Collection[Block], layout: Layout) -> None:
        """Write the manifest over complete shards, and remove what killed processes left behind.

        Args:
            blocks: All that the store has now.
            written: Those of them whose shards are new.
            layout: Of their rows.
        """
        digests = dict(self._digests)
        for block in blocks:
            if block in written or block.file not in digests:  # it may have been written before a manifest was
                digests[block.file] = file_digest(self.folder / block.file)
        text = Manifest(self.cache_key, layout, {block: digests[block.file] for block in blocks}).to_json()
        for left in self.folder.glob(".*.part"):
            left.unlink()
        replace(self.folder / MANIFEST, lambda file: file.write(text))
        self.reload()
