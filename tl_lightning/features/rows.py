"""Serve cached rows to training: many at once, in any order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tl_lightning.features.cache_key import DTYPES
from tl_lightning.features.store import FeatureStore
from tl_lightning.utils.memory import free_memory

RESIDENT_SHARE = 0.5
"""Share of the free memory that rows may take; beyond it, they are read from disk batch by batch."""


class FeatureRows:
    """The cached rows of a split: all on the device if they fit into its memory, otherwise mapped from disk.

    Args:
        store: The store of the rows.
        keys: Content key of each sample, in the order of the split.
        device: The device that rows are returned on.
        share: Share of the device's free memory that the rows may take.

    Raises:
        KeyError: A row is not stored.
        DamagedStoreError: A shard is missing or differs from the one that was written.
    """

    def __init__(
        self, store: FeatureStore, keys: Sequence[str], device: torch.device, share: float = RESIDENT_SHARE
    ) -> None:
        if store.layout is None:
            raise KeyError(f"{str(store.folder)!r} holds no rows")
        self.device = device
        self.resident: Tensor | None = None
        """All rows on the device, in the memory layout of the disk; None if they are mapped from disk."""
        self._layout = store.layout
        self._dtype = DTYPES[store.cache_key.dtype]
        if len(keys) * self._layout.row_bytes(store.cache_key.dtype) <= share * free_memory(device):
            self.resident = store.read_as_stored(keys).to(device)
        else:
            self._shards = store.shards_of(keys)
            self._places = np.array([store.place(key) for key in keys])

    @property
    def index_device(self) -> torch.device:
        """The device on which :meth:`take` reads its indices; from another one, each call copies them."""
        return torch.device("cpu") if self.resident is None else self.device

    def take(self, indices: Tensor) -> Tensor:
        """Return rows in single precision.

        Args:
            indices: Places in the split (N,), int64.

        Shape:
            Output: (N, ...).
        """
        if self.resident is not None:
            rows = self.resident.index_select(0, indices.to(self.device))
        else:
            rows = self._read(indices.cpu()).to(self.device)
        return self._layout.from_disk(rows).float()

    def _read(self, indices: Tensor) -> Tensor:
        shards, places = self._places[indices.numpy()].T
        rows = np.empty((len(places), *self._layout.stored_shape), next(iter(self._shards.values())).dtype)
        for number in np.unique(shards):
            here = shards == number
            rows[here] = self._shards[number][places[here]]
        return torch.from_numpy(rows).view(self._dtype)
