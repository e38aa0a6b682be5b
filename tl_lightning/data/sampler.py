"""The order of the data as a pure function of seed and epoch, on any number of ranks."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tl_lightning.utils.seeding import derive_seed


class SampleKey(NamedTuple):
    """Everything that a dataset needs to make a sample, so that worker processes hold no state."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which a key does not need
    """Place of the sample in its split."""
    epoch: int
    """The current epoch."""
    padding: bool
    """Whether the sample is a padding row."""


class DistributedBatchSampler:
    """Sample the batches of one rank, epoch by epoch.

    Every rank gets equally many batches of equal size, as collective operations need.

    In training, the order of an epoch is cut into global batches, and each rank takes an equal, contiguous part of each
    one. Any number of ranks thus trains on the same global batches. A last batch of one sample joins the batch before,
    since batch norm cannot train on a single sample.

    If the samples do not divide by the ranks, training repeats samples from the start of the order. Evaluation adds
    rows marked as padding, which are excluded from losses and metrics.

    Args:
        length: Number of samples.
        batch_size: Samples per batch and rank.
        shuffle: Draw a new order for each epoch from (seed, epoch), for training. Otherwise keep the order of the
            index, for evaluation.
        seed: Seed of the order.
        rank: Rank of this process.
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
        self.fixed_order = False
        """Use the order of epoch 0 in every epoch, for a trainer with ``overfit_batches``."""
        self.epoch = 0
        self.start = 0
        """Number of batches to skip at the start of the epoch."""
        per_rank = math.ceil(length / world_size)
        sizes = [batch_size] * (per_rank // batch_size) + [per_rank % batch_size] * (per_rank % batch_size > 0)
        if shuffle and len(sizes) > 1 and sizes[-1] == 1 < batch_size:
            sizes[-2:] = [batch_size + 1]
        self._sizes = sizes

    @property
    def order_settings(self) -> dict[str, int]:
        """The settings that, together with the epoch, determine the batches."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "processes": self.world_size,
            "images": self.length,
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Iterate over the keys of each batch of the epoch."""
        for indices, padding in self.batches():
            yield [SampleKey(i, self.epoch, p) for i, p in zip(indices.tolist(), padding.tolist(), strict=True)]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of the epoch, from :attr:`start` on.

        Yields:
            The place of each sample in its split (N,), int64; and whether it is a padding row (N,), bool.
        """
        order = torch.arange(self.length)
        if self.shuffle:
            epoch = 0 if self.fixed_order else self.epoch
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
