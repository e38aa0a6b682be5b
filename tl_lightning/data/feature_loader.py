"""Load batches of cached activations."""

from collections.abc import Callable, Iterator, Sequence

import torch

from tl_lightning.batch import PADDING, Batch
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.sampler import DistributedBatchSampler
from tl_lightning.features import FeatureRows

RowsAt = Callable[[int], tuple[str, FeatureRows]]
"""From an epoch to the boundary that is served in it, and its rows."""


class FeatureLoader(EpochLoader):
    """Take the batches of an epoch, whole, out of cached rows.

    Args:
        rows_at: Returns the boundary and the rows of an epoch.
        targets: Class number of each sample.
        batches: The batches of each epoch.
    """

    def __init__(self, rows_at: RowsAt, targets: Sequence[int], batches: DistributedBatchSampler) -> None:
        super().__init__(batches)
        self._rows_at = rows_at
        self._targets = torch.tensor(targets)

    def load_batches(self) -> Iterator[Batch]:
        """Yield the batches of the epoch."""
        boundary, rows = self._rows_at(self.sampler.epoch)
        batches = list(self.sampler.batches())
        if not batches:
            return
        # Indices and targets go to the device once an epoch: copied batch by batch, they would stall a GPU, which
        # trains a head on a batch in less time than three copies take.
        order = torch.cat([index for index, _ in batches])
        padding = torch.cat([padding for _, padding in batches])
        sizes = [len(index) for index, _ in batches]
        targets = self._targets[order].to(rows.device)
        indices = order.masked_fill(padding, PADDING).to(rows.device)
        for places, target, index in zip(
            torch.split(order.to(rows.index_device), sizes),
            torch.split(targets, sizes),
            torch.split(indices, sizes),
            strict=True,
        ):
            yield Batch(rows.take(places), target, index, boundary)
