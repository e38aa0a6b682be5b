"""Serve a folder of images as training, validation, test and prediction data."""

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.fabric.utilities.data import suggested_max_num_workers
from torch import Tensor
from torchvision.transforms import v2

from tl_lightning.data._folder_index import FolderIndex
from tl_lightning.data._image_check import check_images
from tl_lightning.data.base import ResumableDataModule
from tl_lightning.data.image_loader import ImageDataset, ImageLoader, Transform
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance, compute_image_ids, describe_training_images
from tl_lightning.data.splits import Samples
from tl_lightning.images import WHITE, ImageReader
from tl_lightning.transforms import Flip, Preprocessing, eval_transform, train_transform
from tl_lightning.utils.seeding import run_seed

_MAX_WORKERS = 8
_SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageFolderDataModule(ResumableDataModule):
    """Serve the images of a folder that holds one folder for each class.

    If the root holds ``train``, ``val`` and ``test`` folders of class folders, they are the splits; without ``val``, a
    part of ``train`` is split off for validation. If the root itself holds the class folders, validation and test
    images are split off: a stratified draw from the seed, the same on every rank. The classes are the folders in
    ``train``, sorted. Prediction takes all images below the root, in any folder.

    Args:
        root: The folder.
        batch_size: Samples per batch and process.
        num_workers: Worker processes that load images, per training process; None chooses by the number of CPUs.
        augment: Train on random crops and flips of the images; see :func:`tl_lightning.transforms.train_transform`.
        flip: ``horizontal``; ``both`` for images without an upside; ``none`` for images, such as text, whose mirror
            image would mean something else.
        min_crop: Smallest share of an image's area that a random crop keeps.
        val_fraction: Share of all labelled images for validation, if there is no folder for that split.
        test_fraction: Share of all labelled images for testing, if there are no split folders; 1 tests on all images.
        background: Colour behind transparent parts: red, green and blue from 0 to 255.
        seed: Seed of the split, the order and the augmentation; None takes the seed of ``seed_everything``, otherwise
            42.
        preprocessing: Preprocessing that the backbone expects: ``backbone.preprocessing``. The command line fills it
            in.

    Raises:
        ValueError: The root is empty, the flip is unknown, or a fraction, the crop, the background, the batch size or
            the number of workers is out of range.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        num_workers: int | None = None,
        augment: bool = True,
        flip: Flip = "horizontal",
        min_crop: float = 0.5,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        background: tuple[int, int, int] = WHITE,
        seed: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if not root:
            raise ValueError("root is empty; give the folder that holds the images")
        if num_workers is not None and num_workers < 0:
            raise ValueError(
                f"num_workers is {num_workers}; give a number of worker processes, or 0 to load images in the main one"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if test_fraction != 1 and not (0 < val_fraction < 1 and 0 <= test_fraction < 1 - val_fraction):
            raise ValueError(
                f"val_fraction is {val_fraction} and test_fraction is {test_fraction}; give shares between 0 and 1 "
                "that leave some images for training, or test_fraction 1 to test on all images"
            )
        train_transform(Preprocessing(), flip, min_crop)  # raises if flip or min_crop is invalid
        if not all(0 <= channel <= 255 for channel in background):
            raise ValueError(f"background is {tuple(background)}; red, green and blue go from 0 to 255")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.flip = flip
        self.min_crop = min_crop
        self.background = (background[0], background[1], background[2])
        self.seed = run_seed() if seed is None else seed
        self.preprocessing: Preprocessing | None = preprocessing
        self.folder_index = FolderIndex(self.root, val_fraction, test_fraction, self.seed)
        self._loaders: list[weakref.ref[ImageLoader]] = []  # weak, so that an unused loader ends its worker processes
        self._image_ids: dict[str, Tensor] = {}
        self._checked_splits: set[str] = set()

    # The images -----------------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers: the folders in ``train``, sorted.

        If some classes or the training images are missing, set them to the class names of the classifier to be scored.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are fewer than two class folders, or split folders without ``train``.
        """
        return self.folder_index.class_names

    @class_names.setter
    def class_names(self, names: tuple[str, ...]) -> None:
        self.folder_index.class_names = names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each split that exists: ``train``, ``val``, ``test``.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: A class has no images or is missing in ``train``, or there are too few images.
        """
        return self.folder_index.splits

    @property
    def predict_files(self) -> list[str]:  # type: ignore[override]  # read-only here
        """Paths, relative to the root, of all images below it.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are no images.
        """
        return self.folder_index.images

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """List the images before the run starts, and check the headers of those that are labelled.

        Raises:
            FileNotFoundError: The root does not exist.
            ImageError: Some images cannot be read; the message names them.
            ValueError: The preprocessing or a split is missing, or see :attr:`splits` and :attr:`predict_files`.
        """
        super().setup(stage)
        self._required_preprocessing()
        if stage == "predict":
            _ = self.predict_files
            return
        for split in _SPLITS_OF_STAGE[stage]:
            self.folder_index.require(split)
        self.check_splits(_SPLITS_OF_STAGE[stage])

    def check_splits(self, splits: Iterable[str]) -> None:
        """Check once that the files of these splits are images, by their headers; call it on all ranks.

        Raises:
            ImageError: Some images cannot be read; the message names them.
        """
        unchecked = [split for split in splits if split not in self._checked_splits]
        check_images(self.root, [file for split in unchecked for file in self.splits[split].files])
        self._checked_splits.update(unchecked)

    def train_dataloader(self) -> EpochLoader:
        """Load the training images, shuffled, and augmented with ``augment``."""
        preprocessing = self._required_preprocessing()
        transform = self.augmentation(preprocessing) if self.augment else eval_transform(preprocessing)
        return self.register_train_loader(self._loader(*self.splits["train"], transform, shuffle=True))

    def val_dataloader(self) -> ImageLoader:
        """Load the validation images in order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """Load the test images in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Load all images below the root, in the order of their paths."""
        return self._loader(self.predict_files, None, eval_transform(self._required_preprocessing()), shuffle=False)

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        for loader in [reference() for reference in self._loaders]:
            if loader is not None:
                loader.close()
        self._loaders.clear()
        super().teardown(stage)

    def augmentation(self, preprocessing: Preprocessing) -> v2.Compose:
        """Return the random transform of training images."""
        return train_transform(preprocessing, self.flip, self.min_crop)

    def provenance(self) -> Provenance:
        """Return the identity of the training images."""
        return describe_training_images(self.root, self.splits, self.seed, self.image_ids("train"))

    def image_ids(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64, that identifies the image in later runs."""
        if split not in self._image_ids:
            files = self.splits[split].files if split in self.splits else ()
            self._image_ids[split] = compute_image_ids(self.root, files)
        return self._image_ids[split]

    def training_files(self) -> Sequence[str]:
        """Return the training images, in the order of their IDs."""
        return self.splits["train"].files if "train" in self.splits else ()

    @property
    def effective_num_workers(self) -> int:
        """Number of worker processes that load images, also if ``num_workers`` is None."""
        if self.num_workers is not None:
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(_MAX_WORKERS, suggested_max_num_workers(processes))

    # ----------------------------------------------------------------------------------------------------------------

    def _required_preprocessing(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ValueError(
                f"{type(self).__name__} has no preprocessing, so it does not know which image size and scale the "
                "backbone expects; pass preprocessing=backbone.preprocessing"
            )
        return self.preprocessing

    def _eval_loader(self, split: str) -> ImageLoader:
        samples = self.splits[split]
        return self._loader(
            samples.files, samples.targets, eval_transform(self._required_preprocessing()), shuffle=False
        )

    def _loader(
        self, files: Sequence[str], targets: Sequence[int] | None, transform: Transform, *, shuffle: bool
    ) -> ImageLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        read = ImageReader(self.root, files, self.background)
        dataset = ImageDataset(read, targets, transform, self.seed, self.mark_unreadable and targets is None)
        sampler = self.make_batch_sampler(len(files), shuffle=shuffle)
        loader = ImageLoader(dataset, sampler, num_workers=self.effective_num_workers, pin_memory=on_gpu)
        self._loaders.append(weakref.ref(loader))
        return loader
