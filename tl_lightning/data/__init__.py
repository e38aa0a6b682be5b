"""Data modules: folders of images as batches."""

from tl_lightning.data.image_folder import ImageFolderDataModule
from tl_lightning.data.solar_cells import SolarCellsDataModule

__all__ = ["ImageFolderDataModule", "SolarCellsDataModule"]
