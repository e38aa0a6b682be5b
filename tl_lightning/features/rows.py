"""Rows of a store as training wants them: many at once, in any order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tl_lightning.features._disk_space import RESIDENT_SHARE, row_bytes
from tl_lightning.features.cache_key import DTYPES
from tl_lightning.features.store import FeatureStore
from tl_lightning.utils.memory import free_memory


class FeatureRows:
    """The rows of a split: on the device as a whole where they fit, else mapped from disk.

    Args:
        store: Where they are.
        keys: Of each sample, in the order of its place in the split.
        device: Where they are wanted.
        share: Of the free memory that they may take.

    Raises:
        KeyError: A row is not stored.
        DamagedStoreError: A shard is missing, or is not what was written.
    """

    def __init__(
        self, store: FeatureStore, keys: Sequence[str], device: torch.device, share: float = RESIDENT_SHARE
    ) -> None:
        self.device = device
        self.resident: Tensor | None = None
        """All rows on the device, as they lie on disk; None where they stay there."""
        self._store = store
        if store.layout is None or len(keys) * row_bytes(store.layout, store.cache_key.dtype) <= share * free_memory(
            device
        ):
            self.resident = store.read_as_stored(keys).to(device)
        else:
            self._shards = store.shards_of(keys)
            self._places = np.array([store.place(key) for key in keys])

    def take(self, indices: Tensor) -> Tensor:
        """Return rows in single precision.

        Args:
            indices: Places in the split (n,), int64, on the CPU.

        Shape:
            Output: (n, ...).
        """
        layout = self._store.layout
        assert layout is not None  # noqa: S101 - there are rows
        if self.resident is not None:
            return layout.from_disk(self.resident.index_select(0, indices.to(self.device))).float()
        places = self._places[indices.numpy()]
        rows = np.empty((len(places), *layout.stored_shape), next(iter(self._shards.values())).dtype)
        for number in np.unique(places[:, 0]):
            here = places[:, 0] == number
            rows[here] = self._shards[number][places[here, 1]]
        stored = torch.from_numpy(rows).view(DTYPES[self._store.cache_key.dtype])
        return layout.from_disk(stored.to(self.device)).float()
