"""The order of the data: a pure function of the seed and the epoch, on any number of ranks."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tl_lightning.utils.seeding import derive_seed


class SampleKey(NamedTuple):
    """What a data set needs to know to make a sample, so that no worker holds a state."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which a key has no use for
    epoch: int
    padding: bool


class DistributedBatchSampler:
    """The batches of one rank, epoch by epoch.

    Every rank gets equally many batches of equal size, which collective operations need. In training, the epoch's
    order is cut into global batches, of which each rank takes an equal, contiguous share, so that any number of ranks
    trains on the same global batches; a last sample that would be alone in its batch joins the batch before, since batch
    norm cannot train on one. What does not divide by the ranks is filled up: in training from the start of the epoch's
    order, in evaluation by rows marked as padding, which count for nothing.

    Args:
        length: Number of samples.
        batch_size: Samples per batch and rank.
        shuffle: Draw a new order for each epoch from (seed, epoch); otherwise evaluate, in the order of the index.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat_first_epoch = False
        """Repeat the order of the first epoch in every one, for a trainer that shall overfit a few batches."""
        self.epoch = 0
        self.start = 0
        per_rank = math.ceil(length / world_size)
        sizes = [batch_size] * (per_rank // batch_size) + [per_rank % batch_size] * (per_rank % batch_size > 0)
        if shuffle and len(sizes) > 1 and sizes[-1] == 1 < batch_size:
            sizes[-2:] = [batch_size + 1]
        self._sizes = sizes

    @property
    def order(self) -> dict[str, int]:
        """What the batches of an epoch depend on, beside the epoch."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "processes": self.world_size,
            "images": self.length,
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Iterate over the keys of each batch of the epoch."""
        for indices, padding in self.batches():
            yield [SampleKey(i, self.epoch, p) for i, p in zip(indices.tolist(), padding.tolist(), strict=True)]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of the epoch.

        Yields:
            The place of each sample in its split (N,), int64; and which rows are padding (N,), bool.
        """
        order = torch.arange(self.length)
        if self.shuffle:
            epoch = 0 if self.repeat_first_epoch else self.epoch
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.length, generator=generator)
        total = sum(self._sizes) * self.world_size
        filled = order.repeat(math.ceil(total / max(1, self.length)))[:total]
        padding = torch.arange(total) >= (total if self.shuffle else self.length)
        begin = 0
        for number, size in enumerate(self._sizes):
            if number >= self.start:
                first = begin + self.rank * size
                yield filled[first : first + size], padding[first : first + size]
            begin += size * self.world_size
