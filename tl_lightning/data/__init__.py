"""Data modules: folders of images as batches, or what a frozen network made of them."""

from tl_lightning.data.cached_features import CachedFeaturesDataModule, images_of
from tl_lightning.data.demo import SolarCellsDataModule
from tl_lightning.data.image_folder import ImageFolderDataModule

__all__ = ["CachedFeaturesDataModule", "ImageFolderDataModule", "SolarCellsDataModule", "images_of"]
