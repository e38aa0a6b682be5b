"""Check the folder of images before the network is built or downloaded."""

from jsonargparse import Namespace

from tl_lightning.data import ImageFolderDataModule
from tl_lightning.data._files import check_root


def check_data_folder(config: Namespace, *, with_classes: bool) -> None:
    """Check the folder of the configured data module, which is built only after the network that it takes.

    A subclass of the image folder is left alone, since it may fill its folder later.

    Args:
        config: The configuration of the data module.
        with_classes: Whether the folder has to hold class folders, as for training.

    Raises:
        FileNotFoundError: The folder does not exist.
        OSError: The folder cannot be listed.
        ValueError: The folder holds no class folders.
    """
    images = config.init_args.get("images", config)
    root = images.init_args.get("root")
    if root and images.class_path.rpartition(".")[2] == ImageFolderDataModule.__name__:
        index = ImageFolderDataModule(root).folder_index
        _ = index.class_names if with_classes else check_root(index.root)
