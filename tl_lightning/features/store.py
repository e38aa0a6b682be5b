"""Keep cached features on disk: computed once, found by the content of the image.

A store is a folder of shards, which are arrays of rows (``.npy``), and a manifest that maps images to rows. Each shard
is written under a temporary name, flushed and renamed, and the manifest is replaced last. A process that is killed at
any moment therefore leaves a complete store or none. Shards never change; further rows go into further shards.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from tl_lightning.features._manifest import MANIFEST, Block, Layout, Manifest, StaleStoreError, read_manifest
from tl_lightning.features._shards import NUMPY, Shard, file_digest, is_whole, open_shard, write_shard
from tl_lightning.features.cache_key import DTYPES, CacheKey
from tl_lightning.utils.files import write_atomically

BLOCK = 256
"""Rows of a shard. The rows computed together never depend on the ranks, on restarts or on the batch size."""


class FeatureStore:
    """The cached rows of one cache key.

    Args:
        folder: The folder of the store, which need not exist.
        cache_key: Everything that the rows depend on, beside the images.

    Raises:
        StaleStoreError: The folder holds rows of another cache key or format; the message names the difference.
        DamagedStoreError: The manifest cannot be read.
    """

    def __init__(self, folder: str | Path, cache_key: CacheKey) -> None:
        self.folder = Path(folder)
        self.cache_key = cache_key
        self.layout: Layout | None = None
        """Layout of the rows; None for an empty store."""
        self.blocks: tuple[Block, ...] = ()
        self._digests: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._verified: set[str] = set()
        self.reload()

    @property
    def lock(self) -> FileLock:
        """The lock that writers hold."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder.with_name(f"{self.folder.name}.lock"), mode=0o666)  # several users may share it

    def reload(self) -> None:
        """Read the manifest again, since another run may have added rows.

        Raises:
            StaleStoreError: It is of another cache key or format.
            DamagedStoreError: It cannot be read.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            self.layout, self.blocks, self._digests, self._places = None, (), {}, {}
            return
        if manifest.cache_key != self.cache_key:
            differences = "; ".join(self.cache_key.differences(manifest.cache_key))
            raise StaleStoreError(f"the cached features in {str(self.folder)!r} do not fit: {differences}")
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
        """Return whether the row of a content key is stored."""
        return key in self._places

    # Reading --------------------------------------------------------------------------------------------------------

    def shards_of(self, keys: Sequence[str]) -> dict[int, Shard]:
        """Map the shards that hold the rows of these keys into memory, and verify each once.

        Raises:
            KeyError: A row is not stored.
            DamagedStoreError: A shard is missing or differs from the one that was written.
        """
        return {number: self._shard(number) for number in self._shard_numbers(keys)}

    def check(self, keys: Sequence[str], share: slice = slice(None)) -> None:
        """Verify the shards that hold the rows of these keys, or a share of these shards.

        Raises:
            KeyError: A row is not stored.
            DamagedStoreError: A shard is missing or differs from the one that was written.
        """
        for number in self._shard_numbers(keys)[share]:
            self._shard(number)

    def place(self, key: str) -> tuple[int, int]:
        """Return the number of the shard that holds a row, and the row's place in it."""
        return self._places[key]

    def read(self, keys: Sequence[str]) -> Tensor:
        """Read rows into memory.

        Args:
            keys: Content keys, in any order.

        Returns:
            Rows (N, ...), in the dtype of the store.

        Raises:
            KeyError: A row is not stored.
            DamagedStoreError: A shard is missing or differs from the one that was written.
        """
        rows = self.read_as_stored(keys)
        return rows if self.layout is None else self.layout.from_disk(rows)

    def read_as_stored(self, keys: Sequence[str]) -> Tensor:
        """Read rows as :meth:`read` does, in the memory layout that they have on disk; see :class:`Layout`."""
        dtype = DTYPES[self.cache_key.dtype]
        shape = () if self.layout is None else self.layout.stored_shape
        rows = np.empty((len(keys), *shape), NUMPY[dtype])
        shards = self.shards_of(keys)
        wanted: dict[int, tuple[list[int], list[int]]] = {number: ([], []) for number in shards}
        for position, key in enumerate(keys):
            number, row = self._places[key]
            wanted[number][0].append(position)
            wanted[number][1].append(row)
        for number, (positions, places) in wanted.items():
            rows[positions] = shards[number][places]
        return torch.from_numpy(rows).view(dtype)

    def _shard_numbers(self, keys: Sequence[str]) -> list[int]:
        return sorted({self._places[key][0] for key in keys})

    def _shard(self, number: int) -> Shard:
        block = self.blocks[number]
        digest = None if block.file in self._verified else self._digests[block.file]
        shard = open_shard(self.folder / block.file, len(block.names), digest)
        self._verified.add(block.file)
        return shard

    # Writing --------------------------------------------------------------------------------------------------------

    def plan(self, names: Mapping[str, str]) -> list[Block]:
        """Divide rows into blocks: stored rows stay in theirs, the others follow in the order of ``names``.

        Args:
            names: The name of each wanted row, by content key.

        Returns:
            All blocks of the store once the wanted rows are written.
        """
        kept = [b for b in self.blocks if self.is_written(b) or all(key in names for key in b.keys)]
        known = {key for block in kept for key in block.keys}
        new = [(key, name) for key, name in names.items() if key not in known]
        return kept + [Block(tuple(new[i : i + BLOCK])) for i in range(0, len(new), BLOCK)]

    def is_written(self, block: Block) -> bool:
        """Return whether the shard of a block exists, with all its rows."""
        return is_whole(self.folder / block.file, len(block.names))

    def has_all(self, names: Mapping[str, str]) -> bool:
        """Return whether all wanted rows are stored, and no shard is missing or cut short."""
        return self.plan(names) == list(self.blocks) and all(self.is_written(block) for block in self.blocks)

    def write(self, block: Block, rows: Tensor) -> float:
        """Write the shard of a block, all at once or not at all.

        Args:
            block: The block.
            rows: Rows (N, ...) on the CPU, in the layout that they have on disk; see :meth:`Layout.to_disk`.

        Returns:
            The relative rounding error of the store's dtype: norm of the difference over norm of the rows.

        Raises:
            ValueError: A number is not finite, or too large for the store's dtype.
        """
        narrow = rows.to(DTYPES[self.cache_key.dtype])
        if not torch.isfinite(narrow).all():
            at = f"activations at the boundary {self.cache_key.boundary!r}"
            if torch.isfinite(rows).all():
                raise ValueError(
                    f"{at} go beyond {self.cache_key.dtype}, up to {rows.abs().max():.3g}: set dtype to float32 or "
                    "bfloat16"
                )
            raise ValueError(f"{at} are not finite: look for NaN or infinity in the weights and in the images")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_shard(self.folder / block.file, narrow)
        if narrow.dtype == rows.dtype:
            return 0.0
        return float((narrow.to(rows.dtype) - rows).norm() / rows.norm().clamp_min(1e-30))

    def finish(self, blocks: Sequence[Block], written: Collection[Block], layout: Layout) -> None:
        """Write the manifest, once all shards are complete, and remove the temporary files of killed processes.

        Args:
            blocks: All blocks that the store has now.
            written: The blocks whose shards are new.
            layout: The layout of the rows.
        """
        digests = dict(self._digests)
        for block in blocks:
            if block in written or block.file not in digests:  # a run that was killed may have written the shard
                digests[block.file] = file_digest(self.folder / block.file)
        text = Manifest(self.cache_key, layout, {block: digests[block.file] for block in blocks}).to_json()
        for left in self.folder.glob(".*.part"):
            left.unlink()
        write_atomically(self.folder / MANIFEST, lambda file: file.write(text))
        self.reload()
