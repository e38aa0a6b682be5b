"""What the frozen part of a backbone makes of images, computed once and read back."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tl_lightning.backbones import Backbone
from tl_lightning.batch import RunsFrom
from tl_lightning.data._feature_cache import FeatureCache
from tl_lightning.data.base import ResumableDataModule
from tl_lightning.data.feature_loader import FeatureLoader
from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.data.image_loader import ImageLoader
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance
from tl_lightning.data.splits import TRAIN, Samples
from tl_lightning.features import FeatureRows, check_dtype, like
from tl_lightning.features._messages import name_of
from tl_lightning.freezing import HEAD
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.paths import cache_folder


class CachedFeaturesDataModule(ResumableDataModule):
    """Serve stored activations of a backbone in place of images; what is not stored yet is computed first.

    Any classifier trains on it as on the images, and comes out the same: a classifier of images. What is served is what
    lies before the first stage that has trained by the epoch at hand, so nothing that moves is ever stored. Prediction
    takes the images themselves.

    Training images are not augmented, unless in ``views`` that are drawn once and served in turn, one an epoch.

    Args:
        images: Where the images come from; its ``augment`` is not used.
        backbone: The network, where there is no trainer whose classifier has one. The command line fills it in.
        cache_dir: Folder of all stored activations, which runs and machines may share; None takes the user's cache folder.
        dtype: In which they are stored: ``float32``; or ``float16`` or ``bfloat16``, which take half the space.
        views: Number K of augmented views of each training image; 0 takes the image as it is.

    Raises:
        ValueError: ``views`` is negative, ``cache_dir`` is empty, or there is no such type.
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
            raise ValueError(f"views is {views}; it is a number of augmented views, or 0 for the images as they are")
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

    # What the images are --------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.images.num_classes

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the images go through; None while it is not known."""
        return self.images.preprocessing

    @property
    def splits(self) -> dict[str, Samples]:
        """The labelled images of each split that there is."""
        return self.images.splits

    @property
    def predict_files(self) -> list[str]:
        """Paths, relative to the root, of the images to predict."""
        return self.images.predict_files

    def provenance(self) -> Provenance:
        """Return what identifies the training images."""
        return self.images.provenance()

    def identify(self, split: str) -> Tensor:
        """Return a number for each image of a split (N,), int64, by which it is known again."""
        return self.images.identify(split)

    # What is served -------------------------------------------------------------------------------------------------

    @property
    def network(self) -> Backbone:
        """The backbone of the classifier at hand.

        Raises:
            ValueError: There is none.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        network = module.backbone if isinstance(module, RunsFrom) else self.backbone
        if not isinstance(network, Backbone):
            raise ValueError(  # noqa: TRY004 - what is missing is an argument
                "CachedFeaturesDataModule has no backbone; pass backbone=... or give it to a trainer's fit"
            )
        return network

    def boundaries(self, *, fitting: bool) -> Mapping[int, str]:
        """Return from which epoch on which boundary is served.

        Args:
            fitting: In a fit, up to its end; else at the boundary before which nothing ever trains.
        """
        trainer = self.trainer
        if trainer is None or not isinstance(trainer.lightning_module, RunsFrom):
            return {0: HEAD}
        found = trainer.lightning_module.boundaries()
        if not fitting:
            return {0: found[max(found)]}
        end = max(found) + 1 if trainer.max_epochs in (None, -1) else max(trainer.max_epochs or 0, 1)
        return {epoch: boundary for epoch, boundary in found.items() if epoch < end}

    def complete(self, boundaries: Collection[str]) -> None:
        """Compute and store what is not stored yet at these boundaries; on all ranks."""
        self.cache.complete(self.network.to(self._device()), list(dict.fromkeys(boundaries)))

    def features(self, split: str, boundary: str) -> Tensor:
        """Return what is stored of all images of a split, on the device.

        Shape:
            Output: (N, ...), in the order of the split's files.

        Raises:
            ValueError: There is no such boundary, or there are several views of each image.
        """
        if split == TRAIN and self.views:
            raise ValueError(
                f"the training images are stored as {self.views} augmented views each, and not as they are: leave views out to "
                "have one row of each"
            )
        files = self.splits[split].files
        rows = self.cache.rows(self.network, boundary, files, None, self._device())
        return rows.take(torch.arange(len(files)))

    def describe(self) -> str:
        """Say what training sees."""
        boundaries = ", ".join(
            f"{name_of(boundary)}{f' from epoch {epoch} on' if epoch else ''}"
            for epoch, boundary in self.boundaries(fitting=True).items()
        )
        views = (
            f"{self.views} augmented views of each training image" if self.views else "training images not augmented"
        )
        return f"stored {boundaries}; {views}"

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
        """Look at the images before the run starts."""
        super().setup(stage)
        self.images.trainer = self.trainer
        if self.images.preprocessing is None:
            self.images.preprocessing = self.network.preprocessing
        self.images.setup(stage)
        self.cache.forget()
        self._rows.clear()

    def train_dataloader(self) -> EpochLoader:
        """Serve what is stored of the training images, shuffled."""
        return self.train_on(self._loader(TRAIN))

    def val_dataloader(self) -> EpochLoader:
        """Serve what is stored of the validation images, in order."""
        return self._loader("val")

    def test_dataloader(self) -> EpochLoader:
        """Serve what is stored of the test images, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Load all images below the root, in the order of their paths."""
        return self.images.predict_dataloader()

    def teardown(self, stage: str) -> None:
        """Free the memory."""
        self._rows.clear()
        self.images.teardown(stage)
        super().teardown(stage)

    # ----------------------------------------------------------------------------------------------------------------

    def _loader(self, split: str) -> FeatureLoader:
        samples = self.splits[split]
        self.complete(self.boundaries(fitting=self._is_fitting()).values())
        shuffle = split == TRAIN
        return FeatureLoader(
            lambda epoch: self._rows_at(split, epoch), samples.targets, self.order(len(samples.files), shuffle=shuffle)
        )

    def _is_fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return like(self.network).device


def images_of(data: object) -> ImageFolderDataModule | None:
    """Return the folder of images that a data module serves or stands in for; None if it does neither."""
    images = data.images if isinstance(data, CachedFeaturesDataModule) else data
    return images if isinstance(images, ImageFolderDataModule) else None
