"""Compute features without training."""

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tl_lightning.callbacks.table import print_table
from tl_lightning.data import CachedFeaturesDataModule


class TransferTrainer(Trainer):
    """Customize every aspect of training, and compute features alone."""

    def extract(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Compute and store what training on cached features would compute first, on all ranks.

        Args:
            model: The classifier that would be trained.
            datamodule: A :class:`CachedFeaturesDataModule`.

        Raises:
            TypeError: It is another one.
        """
        if not isinstance(datamodule, CachedFeaturesDataModule):
            raise TypeError(
                f"extract stores what CachedFeaturesDataModule serves, and data is {type(datamodule).__name__}: put it into one, "
                f"as --data CachedFeaturesDataModule --data.images {type(datamodule).__name__}"
            )
        batches, self.limit_val_batches = self.limit_val_batches, 0
        try:
            self.validate(model, datamodule=_Extraction(datamodule), verbose=False)
        finally:
            self.limit_val_batches = batches


class _Extraction(LightningDataModule):
    """Compute features where Lightning sets data up: on all ranks, once these know each other."""

    def __init__(self, data: CachedFeaturesDataModule) -> None:
        super().__init__()
        self.data = data

    def prepare_data(self) -> None:
        """Prepare the images."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Compute the features."""
        self.data.trainer = self.trainer
        self.data.setup("fit")
        self.data.complete(fitting=True)
        print_table("extracted", {"features": self.data.describe(), "folder": str(self.data.stored.cache_dir)})

    def val_dataloader(self) -> list[object]:
        """Return nothing to validate on."""
        return []
