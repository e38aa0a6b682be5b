"""Batches of stored activations."""

from collections.abc import Callable, Iterator, Sequence

import torch

from tl_lightning.batch import PADDING, Batch
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.features import FeatureRows

RowsAt = Callable[[int], tuple[str, FeatureRows]]
"""From an epoch to the boundary that is served in it, and the rows."""


class FeatureLoader(EpochLoader):
    """Take the batches of an epoch, whole, out of what is stored.

    Args:
        rows_at: Tells what is served in an epoch.
        targets: Class number of each sample.
        batches: The order.
    """

    def __init__(self, rows_at: RowsAt, targets: Sequence[int], batches: DistributedBatchSampler) -> None:
        super().__init__(batches)
        self._rows_at = rows_at
        self._targets = torch.tensor(targets)

    def produce(self) -> Iterator[Batch]:
        """Take the batches."""
        boundary, rows = self._rows_at(self.sampler.epoch)
        for index, padding in self.sampler.batches():
            yield Batch(rows.take(index), self._targets[index], index.masked_fill(padding, PADDING), boundary)
