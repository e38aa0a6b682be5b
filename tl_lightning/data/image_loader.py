"""Batches of images, read and prepared by worker processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tl_lightning.batch import PADDING, UNLABELLED, Batch
from tl_lightning.data._workers import outlive_sigterm, wait_until_safe_to_fork
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.sampler import DistributedBatchSampler, SampleKey
from tl_lightning.images import ImageError
from tl_lightning.utils.seeding import seeded

_Sample = tuple[Tensor, int, int]  # image, target, index


Transform = Callable[[Tensor], Tensor]
"""From a uint8 image (3, H, W) to a float image (3, h, w)."""

ReadImage = Callable[[int], Tensor]
"""From the place of an image in its split to a uint8 image (3, H, W)."""


class ImageDataset(Dataset[_Sample]):
    """Images by (index, epoch), so that augmentation depends on nothing else.

    Args:
        read: Reads an image by its place in the split.
        targets: Class numbers by place in the split; None where they are not known.
        transform: What the image goes through; it may draw from torch, numpy and random.
        seed: Seed of the augmentation.
    """

    def __init__(self, read: ReadImage, targets: Sequence[int] | None, transform: Transform, seed: int) -> None:
        self.read = read
        self.targets = targets
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> _Sample:
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


class ImageLoader(EpochLoader):
    """Load the batches of an epoch from image files.

    Args:
        dataset: Samples by :class:`SampleKey`.
        batches: The order.
        num_workers: Processes that prepare samples; 0 prepares them in this one.
        pin_memory: Put batches into pinned memory, for a GPU.
    """

    def __init__(
        self, dataset: Dataset[_Sample], batches: DistributedBatchSampler, *, num_workers: int, pin_memory: bool
    ) -> None:
        super().__init__(batches)
        self._loader: DataLoader[_Sample] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=outlive_sigterm,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would draw from the global generator
        )

    def produce(self) -> Iterator[Batch]:
        """Load the batches."""
        return _batches_of(self._loader)

    def close(self) -> None:
        """End the worker processes, which would otherwise stay until Python gets round to it."""
        iterator = self._loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._loader._iterator = None


def load_in_order(dataset: Dataset[_Sample], batches: Sequence[Sequence[object]], num_workers: int) -> Iterator[Tensor]:
    """Load images.

    Args:
        dataset: Samples by key, whatever a key is.
        batches: Keys of each batch.
        num_workers: Processes that prepare samples; 0 prepares them in this one.

    Yields:
        (n, 3, H, W), the images of each batch.
    """
    loader: DataLoader[_Sample] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # torch says lists of whatever the data set takes, and means ints
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator(),
    )
    for batch in _batches_of(loader):
        yield batch.inputs


def load_by_threads(dataset: Dataset[_Sample], batches: Sequence[Sequence[object]]) -> Iterator[Tensor]:
    """Load images as :func:`load_in_order` does, by threads of this process, as many as the network has.

    Each batch is loaded when it is asked for.

    Where the network runs on the same cores, worker processes that load ahead take them from it: it then waits at each of
    its operations for the thread that was put off, and a pass over images took a quarter longer on two cores.

    Args:
        dataset: Samples by key; nothing that draws from global generators.
        batches: Keys of each batch.

    Yields:
        (n, 3, H, W), the images of each batch.
    """
    Image.init()  # else threads would do it, and one could meet a list of formats that another has half filled
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for keys in batches:
            yield collate(list(threads.map(dataset.__getitem__, keys))).inputs


def _batches_of(loader: "DataLoader[_Sample]") -> Iterator[Batch]:
    if loader.num_workers > 0 and loader._iterator is None:
        wait_until_safe_to_fork()
    try:
        yield from loader
    except ImageError as error:
        # torch raises an error of a worker process again with the whole traceback as its message:
        # https://github.com/pytorch/pytorch/blob/main/torch/_utils.py, ExceptionWrapper.reraise
        message = str(error).rpartition(f"{ImageError.__module__}.{ImageError.__qualname__}: ")[2]
        raise ImageError(message.rstrip()) from error
