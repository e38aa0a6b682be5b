"""Serve cached activations of a backbone in place of images."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tl_lightning.backbones import Backbone
from tl_lightning.batch import CacheableModule
from tl_lightning.data._feature_cache import FeatureCache
from tl_lightning.data.base import ResumableDataModule
from tl_lightning.data.feature_loader import FeatureLoader
from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.data.image_loader import ImageLoader
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance
from tl_lightning.data.splits import TRAIN, Samples
from tl_lightning.features import FeatureRows, check_dtype, describe_boundary, reference_tensor
from tl_lightning.freezing import HEAD
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.paths import cache_folder


class CachedFeaturesDataModule(ResumableDataModule):
    """Serve cached activations of a backbone in place of images, and compute the missing ones first.

    Any classifier trains on it as on the images and ends with the same weights, so that it classifies images. In each
    epoch, the module serves the input of the first stage that has trained by then: activations that change are never
    cached. Prediction reads the images themselves.

    Training images are not augmented. With ``views``, augmented views are drawn once and served in turn, one an epoch.

    Args:
        images: The data module of the images; its ``augment`` is not used.
        backbone: The network, if no trainer provides a classifier. The command line fills it in.
        cache_dir: Folder of the cache, which runs and machines may share; None takes the user's cache folder.
        dtype: The dtype of the cache: ``float32``; or ``float16`` or ``bfloat16``, which take half the space.
        views: Number K of augmented views of each training image; 0 for the images without augmentation.

    Raises:
        ValueError: ``views`` is negative, ``cache_dir`` is empty, or ``dtype`` is unknown.
    """

    def __init__(
        self,
        images: ImageFolderDataModule,
        backbone: Backbone | None = None,
        cache_dir: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        views: int = 0,
    ) -> None:
        super().__init__()
        if views < 0:
            raise ValueError(
                f"views is {views}; give the number of augmented views of each training image, or 0 for none"
            )
        if cache_dir == "":
            raise ValueError("cache_dir is ''; give a folder, '.' for the current one, or leave it out")
        check_dtype(dtype)
        self.images = images
        self.root = images.root
        self.batch_size = images.batch_size
        self.seed = images.seed
        self.backbone = backbone
        self.views = views
        folder = cache_folder() / "features" if cache_dir is None else Path(cache_dir)
        self.cache = FeatureCache(images, folder, dtype, views)
        self._rows: dict[tuple[str, int | None], tuple[str, FeatureRows]] = {}

    # The images -----------------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only here
        """Names of the classes, in the order of their numbers."""
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.images.num_classes

    @property
    def preprocessing(self) -> Preprocessing | None:  # type: ignore[override]  # read-only here
        """Preprocessing of the images; None before ``setup`` if none was given."""
        return self.images.preprocessing

    @property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each existing split."""
        return self.images.splits

    @property
    def predict_files(self) -> list[str]:  # type: ignore[override]  # read-only here
        """Paths, relative to the root, of the images to predict."""
        return self.images.predict_files

    def provenance(self) -> Provenance:
        """Identify the training images."""
        return self.images.provenance()

    def image_ids(self, split: str) -> Tensor:
        """Return a number that identifies each image of a split (N,), int64."""
        return self.images.image_ids(split)

    def training_files(self) -> Sequence[str]:
        """Return the training images, in the order of their IDs."""
        return self.images.training_files()

    # The cached activations -----------------------------------------------------------------------------------------

    @property
    def network(self) -> Backbone:
        """The backbone of the trainer's classifier; without one, the ``backbone`` argument.

        Raises:
            ValueError: There is neither.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        network = module.backbone if isinstance(module, CacheableModule) else self.backbone
        if not isinstance(network, Backbone):
            raise ValueError(  # noqa: TRY004 - an argument is missing
                "CachedFeaturesDataModule has no backbone; pass backbone=... or give it to a trainer's fit"
            )
        return network

    def boundaries(self, *, fitting: bool) -> Mapping[int, str]:
        """Map each epoch in which the served boundary moves, 0 first, to that boundary.

        Args:
            fitting: Give the boundaries of a fit, up to its end; otherwise the one before which nothing ever trains.
        """
        trainer = self.trainer
        if trainer is None or not isinstance(trainer.lightning_module, CacheableModule):
            return {0: HEAD}
        found = trainer.lightning_module.boundaries()
        if not fitting:
            return {0: found[max(found)]}
        end = max(found) + 1 if trainer.max_epochs in (None, -1) else max(trainer.max_epochs or 0, 1)
        return {epoch: boundary for epoch, boundary in found.items() if epoch < end}

    def complete(self, boundaries: Collection[str]) -> None:
        """Compute and cache the missing activations at these boundaries; call it on all ranks."""
        self.cache.complete(self.network.to(self._device()), list(dict.fromkeys(boundaries)))

    def features(self, split: str, boundary: str) -> Tensor:
        """Return the cached activations of all images of a split, on the device.

        Shape:
            Output: (N, ...), in the order of the split's files.

        Raises:
            ValueError: The boundary is unknown, or the training images are cached as augmented views.
        """
        if split == TRAIN and self.views:
            raise ValueError(
                f"the training images are cached as {self.views} augmented views each: leave views out, so that each "
                "image has one row"
            )
        files = self.splits[split].files
        rows = self.cache.rows(self.network, boundary, files, None, self._device())
        return rows.take(torch.arange(len(files)))

    def describe(self) -> str:
        """Describe the inputs of training in one line."""
        boundaries = ", ".join(
            f"{describe_boundary(boundary)}{f' from epoch {epoch} on' if epoch else ''}"
            for epoch, boundary in self.boundaries(fitting=True).items()
        )
        views = (
            f"{self.views} augmented views of each training image" if self.views else "training images not augmented"
        )
        return f"cached {boundaries}; {views}"

    def _rows_at(self, split: str, epoch: int) -> tuple[str, FeatureRows]:
        boundaries = self.boundaries(fitting=self._is_fitting())
        boundary = boundaries[max(first for first in boundaries if first <= epoch)]
        view = epoch % self.views if split == TRAIN and self.views else None
        known = self._rows.get((split, view))
        if known is None or known[0] != boundary:
            files = self.splits[split].files
            self._rows[split, view] = boundary, self.cache.rows(self.network, boundary, files, view, self._device())
        return self._rows[split, view]

    # Lightning's hooks ----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the images."""
        self.images.prepare_data()

    def setup(self, stage: str) -> None:
        """List and check the images, and forget rows of an earlier run."""
        super().setup(stage)
        self.images.trainer = self.trainer
        if self.images.preprocessing is None:
            self.images.preprocessing = self.network.preprocessing
        self.images.setup(stage)
        self.images.check_splits(() if stage == "predict" else self.splits)  # features of all splits are computed
        self.cache.forget()
        self._rows.clear()

    def train_dataloader(self) -> EpochLoader:
        """Serve the cached activations of the training images, shuffled."""
        return self.register_train_loader(self._loader(TRAIN))

    def val_dataloader(self) -> EpochLoader:
        """Serve the cached activations of the validation images, in order."""
        return self._loader("val")

    def test_dataloader(self) -> EpochLoader:
        """Serve the cached activations of the test images, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Load all images below the root, in the order of their paths."""
        self.images.mark_unreadable = self.mark_unreadable
        return self.images.predict_dataloader()

    def teardown(self, stage: str) -> None:
        """Free the memory of the rows."""
        self._rows.clear()
        self.images.teardown(stage)
        super().teardown(stage)

    # ----------------------------------------------------------------------------------------------------------------

    def _loader(self, split: str) -> FeatureLoader:
        samples = self.splits[split]
        self.complete(self.boundaries(fitting=self._is_fitting()).values())
        shuffle = split == TRAIN
        return FeatureLoader(
            lambda epoch: self._rows_at(split, epoch),
            samples.targets,
            self.make_batch_sampler(len(samples.files), shuffle=shuffle),
        )

    def _is_fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return reference_tensor(self.network).device


def images_of(data: object) -> ImageFolderDataModule | None:
    """Return the data module of images that ``data`` is or stands in for; None for any other."""
    images = data.images if isinstance(data, CachedFeaturesDataModule) else data
    return images if isinstance(images, ImageFolderDataModule) else None
