"""Data modules that serve folders of images, or cached features of them, in an order that can be resumed.

Use :class:`ImageFolderDataModule` for images in one folder per class, and :class:`CachedFeaturesDataModule` to compute
frozen stages once. For other data, subclass :class:`ResumableDataModule` and build its loaders from the classes here:
:class:`DistributedBatchSampler` orders the samples, :class:`EpochLoader` iterates over the batches.
"""

from tl_lightning.data.base import ResumableDataModule
from tl_lightning.data.cached_features import CachedFeaturesDataModule, images_of
from tl_lightning.data.demo import SolarCellsDataModule
from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.data.image_loader import ImageDataset, ImageLoader
from tl_lightning.data.loader import EpochLoader
from tl_lightning.data.provenance import Provenance
from tl_lightning.data.sampler import DistributedBatchSampler, SampleKey
from tl_lightning.data.splits import Samples

__all__ = [
    "CachedFeaturesDataModule",
    "DistributedBatchSampler",
    "EpochLoader",
    "ImageDataset",
    "ImageFolderDataModule",
    "ImageLoader",
    "Provenance",
    "ResumableDataModule",
    "SampleKey",
    "Samples",
    "SolarCellsDataModule",
    "images_of",
]
