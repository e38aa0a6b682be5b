"""Load batches of images by worker processes or threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tl_lightning.batch import PADDING, UNLABELLED, UNREADABLE, Batch
from tl_lightning.data._workers import explain_death, prepare_worker, wait_until_safe_to_fork, watch_workers
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.sampler import DistributedBatchSampler, SampleKey
from tl_lightning.images import ImageError
from tl_lightning.utils.seeding import seeded

_BLACK = torch.zeros(3, 64, 64, dtype=torch.uint8)
_Sample = tuple[Tensor, int, int]  # image, target, index

Transform = Callable[[Tensor], Tensor]
"""From a uint8 image (3, H, W) to a float image (3, h, w)."""

ReadImage = Callable[[int], Tensor]
"""From the place of an image in its split to a uint8 image (3, H, W)."""


class ImageDataset(Dataset[_Sample]):
    """Read and transform images; augmentation is a function of (seed, epoch, sample index).

    Args:
        read: Reads an image by its place in the split.
        targets: Class numbers by place in the split; None if they are unknown.
        transform: Transforms an image; it may draw from the global generators of torch, numpy and random.
        seed: Seed of the augmentation.
        mark_unreadable: Give a black image with the index ``PADDING`` and a target up to ``UNREADABLE`` instead of an
            image that cannot be read.
    """

    def __init__(
        self,
        read: ReadImage,
        targets: Sequence[int] | None,
        transform: Transform,
        seed: int,
        mark_unreadable: bool = False,
    ) -> None:
        self.read = read
        self.targets = targets
        self.transform = transform
        self.seed = seed
        self.mark_unreadable = mark_unreadable

    def __getitem__(self, key: SampleKey) -> _Sample:
        """Make the sample of a key.

        Raises:
            ImageError: The image cannot be read, and such images are not marked.
        """
        try:
            image = self.read(key.index)
        except ImageError:
            if not self.mark_unreadable:
                raise
            return self.transform(_BLACK), UNREADABLE - key.index, PADDING
        with seeded(self.seed, "augmentation", key.epoch, key.index):
            image = self.transform(image)
        target = UNLABELLED if self.targets is None else self.targets[key.index]
        return image, target, PADDING if key.padding else key.index


def collate(samples: Sequence[_Sample]) -> Batch:
    """Stack samples into a batch of images."""
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), None)


class ImageLoader(EpochLoader):
    """Load the batches of an epoch from image files.

    Args:
        dataset: Maps a :class:`SampleKey` to a sample.
        sampler: The batches of each epoch.
        num_workers: Number of worker processes; 0 loads images in this process.
        pin_memory: Put batches into pinned memory, for a GPU.
    """

    def __init__(
        self, dataset: Dataset[_Sample], sampler: DistributedBatchSampler, *, num_workers: int, pin_memory: bool
    ) -> None:
        super().__init__(sampler)
        self._loader: DataLoader[_Sample] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=prepare_worker,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise every epoch would draw a seed from the global generator
        )

    def load_batches(self) -> Iterator[Batch]:
        """Yield the batches of the epoch, from the sampler's start on."""
        return _batches_of(self._loader)

    def close(self) -> None:
        """End the worker processes now rather than when Python frees the loader."""
        iterator = self._loader._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._loader._iterator = None


def load_with_workers(
    dataset: Dataset[_Sample], batches: Sequence[Sequence[object]], num_workers: int
) -> Iterator[Tensor]:
    """Load images by worker processes.

    Args:
        dataset: Maps a key of any type to a sample.
        batches: Keys of each batch.
        num_workers: Number of worker processes; 0 loads images in this process.

    Yields:
        The images of each batch (n, 3, H, W).
    """
    loader: DataLoader[_Sample] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # torch's types allow integer keys only
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),
    )
    for batch in _batches_of(loader):
        yield batch.inputs


def load_with_threads(dataset: Dataset[_Sample], batches: Sequence[Sequence[object]]) -> Iterator[Tensor]:
    """Load images as :func:`load_with_workers` does, by as many threads of this process as torch computes with.

    Each batch is loaded when it is asked for. Worker processes that load ahead on the cores of the network slow it
    down: each of its operations then waits for the thread whose core was taken. On two cores, threads saved a quarter
    of the time.

    Args:
        dataset: Maps a key of any type to a sample, without drawing from global generators.
        batches: Keys of each batch.

    Yields:
        The images of each batch (n, 3, H, W).
    """
    Image.init()  # otherwise the threads would run it, and one could see a list of formats that another has half filled
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for keys in batches:
            yield collate(list(threads.map(dataset.__getitem__, keys))).inputs


def _batches_of(loader: "DataLoader[_Sample]") -> Iterator[Batch]:
    if loader.num_workers > 0 and loader._iterator is None:
        wait_until_safe_to_fork()
    if loader.num_workers > 0:
        watch_workers()
    try:
        yield from loader
    except ImageError as error:
        # torch raises the error of a worker process again with the whole traceback as its message:
        # https://github.com/pytorch/pytorch/blob/main/torch/_utils.py, ExceptionWrapper.reraise
        message = str(error).rpartition(f"{ImageError.__module__}.{ImageError.__qualname__}: ")[2]
        raise ImageError(message.rstrip()) from error
    except RuntimeError as error:
        explained = explain_death(error)
        if explained is error:
            raise
        raise explained from error
