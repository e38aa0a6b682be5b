"""A folder of images as training, validation, test and prediction data."""

import weakref
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.data import suggested_max_num_workers
from torch import Tensor
from torchvision.transforms import v2

from tl_lightning.data._folder_index import FolderIndex
from tl_lightning.data.base import ResumableDataModule
from tl_lightning.data.image_loader import ImageDataset, ImageLoader, Transform
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance, describe_training_images, identify
from tl_lightning.data.splits import Samples
from tl_lightning.images import WHITE, ImageReader
from tl_lightning.transforms import Flip, Preprocessing, eval_transform, train_transform
from tl_lightning.utils.seeding import run_seed

_MOST_WORKERS = 8
_SPLITS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageFolderDataModule(ResumableDataModule):
    """Serve the images of a folder that holds one folder for each class.

    Where the root holds ``train``, ``val`` and ``test`` folders of class folders, these are the splits; without ``val``, a
    part of ``train`` is split off for validation. Where the root holds class folders itself, validation and test parts are
    split off: a stratified draw from the seed, the same on every rank. Classes are the folders of ``train``, sorted. For
    prediction all images below the root are taken, in whatever folders.

    Args:
        root: The folder.
        batch_size: Samples per batch and process.
        num_workers: Processes that load images, for each training process; None chooses by the number of CPUs.
        augment: Train on random crops and flips of the images; see :func:`tl_lightning.transforms.train_transform`.
        flip: Which flips: ``horizontal``, ``both`` for what has no upside, ``none`` for what a mirror image would change.
        min_crop: Smallest share of an image's area that a random crop keeps.
        val_fraction: Share of all labelled images that is split off for validation where no folder gives it.
        test_fraction: Share of all labelled images that is split off for testing where no folder gives any split; 1 tests
            on all of them.
        background: What transparent parts show: red, green and blue from 0 to 255.
        seed: Seed of the split, the order and the augmentation; None takes that of ``seed_everything``, else 42.
        preprocessing: What the backbone wants: ``backbone.preprocessing``. The command line fills it in.

    Raises:
        FileNotFoundError: The root does not exist.
        ValueError: A fraction, the crop, or the batch size is out of range.
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
            raise ValueError(f"num_workers is {num_workers}; it is a number of processes, or 0 to load in this one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if test_fraction != 1 and not (0 < val_fraction < 1 and 0 <= test_fraction < 1 - val_fraction):
            raise ValueError(
                f"val_fraction is {val_fraction} and test_fraction {test_fraction}; both are shares between 0 and 1 that "
                "leave some images for training, or test_fraction is 1 to test on all images"
            )
        train_transform(Preprocessing(), flip, min_crop)  # raises where they cannot be
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
        self.preprocessing = preprocessing
        self.folder_index = FolderIndex(self.root, val_fraction, test_fraction, self.seed)
        self._loaders: list[weakref.ref[ImageLoader]] = []  # weak, since one that is no longer used ends its processes
        self._identities: dict[str, Tensor] = {}

    # What the folder holds ------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers: the folders of ``train``.

        To score a classifier on images of which some classes, or the training images, are missing, set them to its own.

        Raises:
            FileNotFoundError: The root does not exist.
            ValueError: There are fewer than two class folders, or folders for other splits than ``train`` alone.
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
        """The labelled images of each split that there is: ``train``, ``val``, ``test``; see :class:`FolderIndex`."""
        return self.folder_index.splits

    @property
    def predict_files(self) -> list[str]:
        """Paths, relative to the root, of the images to predict; see :class:`FolderIndex`."""
        return self.folder_index.images

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Look at the folder before the run starts.

        Raises:
            ValueError: The preprocessing is missing, or what :attr:`splits` and :attr:`predict_files` raise.
        """
        super().setup(stage)
        self._known_preprocessing()
        if stage == "predict":
            _ = self.predict_files
            return
        for split in _SPLITS_OF[stage]:
            if split not in self.splits:
                there = ", ".join(f"{len(samples.files)} for {name}" for name, samples in self.splits.items())
                raise ValueError(
                    f"{str(self.root)!r} has images {there}, and none for {split!r}; add a folder {split!r}, or where there "
                    f"are no split folders, set {'val' if split == 'val' else 'test'}_fraction"
                )

    def train_dataloader(self) -> EpochLoader:
        """Load the training images, shuffled, and augmented if so chosen."""
        preprocessing = self._known_preprocessing()
        transform = self.augmentation(preprocessing) if self.augment else eval_transform(preprocessing)
        return self.train_on(self._loader(*self.splits["train"], transform, shuffle=True))

    def val_dataloader(self) -> ImageLoader:
        """Load the validation images in order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """Load the test images in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Load all images below the root, in the order of their paths."""
        return self._loader(self.predict_files, None, eval_transform(self._known_preprocessing()), shuffle=False)

    def teardown(self, stage: str) -> None:
        """End the processes that load images."""
        for loader in [reference() for reference in self._loaders]:
            if loader is not None:
                loader.close()
        self._loaders.clear()
        super().teardown(stage)

    def augmentation(self, preprocessing: Preprocessing) -> v2.Compose:
        """Return the random transform of training images."""
        return train_transform(preprocessing, self.flip, self.min_crop)

    def provenance(self) -> Provenance:
        """Return what identifies the training images."""
        return describe_training_images(self.root, self.splits, self.seed, self.identify("train"))

    def identify(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64, by which it is known again."""
        if split not in self._identities:
            self._identities[split] = identify(self.root, self.splits[split].files if split in self.splits else ())
        return self._identities[split]

    # ----------------------------------------------------------------------------------------------------------------

    def _known_preprocessing(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ValueError(
                f"{type(self).__name__} has no preprocessing, so it cannot know which size and scale the backbone wants; "
                "pass preprocessing=backbone.preprocessing"
            )
        return self.preprocessing

    def _eval_loader(self, split: str) -> ImageLoader:
        samples = self.splits[split]
        return self._loader(samples.files, samples.targets, eval_transform(self._known_preprocessing()), shuffle=False)

    def _loader(
        self, files: Sequence[str], targets: Sequence[int] | None, transform: Transform, *, shuffle: bool
    ) -> ImageLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        read = ImageReader(self.root, files, self.background)
        dataset = ImageDataset(read, targets, transform, self.seed)
        batches = self.order(len(files), shuffle=shuffle)
        loader = ImageLoader(dataset, batches, num_workers=self.workers, pin_memory=on_gpu)
        self._loaders.append(weakref.ref(loader))
        return loader

    @property
    def workers(self) -> int:
        """Number of processes that load images."""
        if self.num_workers is not None:
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(_MOST_WORKERS, suggested_max_num_workers(processes))
