"""A loader that can be left in the middle of an epoch and taken up again there."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tl_lightning.batch import PADDING, UNLABELLED, Batch
from tl_lightning.chance import seeded
from tl_lightning.data.order import EpochBatches, Key

_REST_S = 0.05
_NOWHERE = (-1, 0)

_Sample = tuple[Tensor, int, int]  # image, target, index


class Transform(Protocol):
    """From a uint8 image (3, H, W) to a float image (3, h, w)."""

    def __call__(self, image: Tensor, /) -> Tensor:
        """Transform the image."""


class ReadsImages(Protocol):
    """From a place in a split to a uint8 image (3, H, W)."""

    def __call__(self, index: int, /) -> Tensor:
        """Read the image at a place."""


class ImageDataset(Dataset[_Sample]):
    """Images by (index, epoch), so that augmentation depends on nothing else.

    Args:
        read: Reads an image by its place in the split.
        targets: Class numbers by place in the split; None where they are not known.
        transform: What the image goes through; it may draw from torch, numpy and random.
        seed: Seed of the augmentation.
    """

    def __init__(self, read: ReadsImages, targets: Sequence[int] | None, transform: Transform, seed: int) -> None:
        self.read = read
        self.targets = targets
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> _Sample:
        """Make the sample of a key."""
        image = self.read(key.index)
        with seeded(self.seed, "augmentation", key.epoch, key.index):
            image = self.transform(image)
        target = UNLABELLED if self.targets is None else self.targets[key.index]
        return image, target, PADDING if key.padding else key.index


def collate(samples: Sequence[_Sample]) -> Batch:
    """Put samples into a batch of images."""
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), None)


class EpochLoader:
    """Iterate the batches of an epoch; the state counts the batches that were handed out, not those prefetched.

    This is no ``torch.utils.data.DataLoader``, so that Lightning leaves its order alone: Lightning would shuffle it, cut
    it among the ranks and pad it in its own way.

    Args:
        dataset: Samples by :class:`Key`.
        batches: The order.
        num_workers: Processes that prepare samples; 0 prepares them in this one.
        pin_memory: Put batches into pinned memory, for a GPU.
    """

    def __init__(self, dataset: Dataset[_Sample], batches: EpochBatches, *, num_workers: int, pin_memory: bool) -> None:
        self.sampler = self.batch_sampler = batches  # where Lightning looks for set_epoch, and for shuffling
        self._consumed = 0
        self._resume_at = _NOWHERE
        self._loader: DataLoader[_Sample] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would draw from the global generator
        )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the epoch, or over those that are left of it after a state was loaded."""
        # A generator: it looks at the epoch when the first batch is asked for, since Lightning makes the iterator of a
        # resumed run before it says which epoch it is.
        (epoch, consumed), self._resume_at = self._resume_at, _NOWHERE
        self._consumed = self.sampler.start = consumed if epoch == self.sampler.epoch else 0
        if self._loader.num_workers > 0 and self._loader._iterator is None:
            _wait_until_safe_to_fork()
        for batch in self._loader:
            self._consumed += 1
            yield batch

    def close(self) -> None:
        """End the worker processes, which would otherwise stay until Python gets round to it."""
        iterator = self._loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._loader._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, how many of its batches were handed out, and what the order of the rest depends on."""
        return {"epoch": self.sampler.epoch, "batches": self._consumed, "of": len(self)} | self.sampler.order

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of a saved state, if its epoch comes next.

        Raises:
            ValueError: The state lies within an epoch, whose rest would be other batches now.
        """
        changed = [
            f"{name} was {state[name]} and is {now}"
            for name, now in self.sampler.order.items()
            if state.get(name, now) != now
        ]
        if changed and 0 < state["batches"] < state.get("of", len(self)):
            raise ValueError(
                f"the checkpoint was written within epoch {state['epoch']}, and the rest of that epoch would be other batches "
                f"now: {'; '.join(changed)}. Resume with what it was, or from a checkpoint at the end of an epoch"
            )
        self._resume_at = (state["epoch"], state["batches"])
        self._consumed = state["batches"]
        self.sampler.set_epoch(state["epoch"])


def _wait_until_safe_to_fork() -> None:
    """Let the threads of the last collective operation come to rest before worker processes are forked.

    When one has just ended, a thread of torch.distributed frees its tensors, for which it registers with Python. Before
    Python 3.12 a process forked at that very moment waits for ever for the lock that this takes: ``PyOS_AfterFork_Child``
    makes that lock anew only after it has used it.
    """
    if sys.version_info < (3, 12) and dist.is_available() and dist.is_initialized():
        time.sleep(_REST_S)
