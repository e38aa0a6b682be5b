"""Compute features without training."""

from collections.abc import Collection

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tl_lightning.data import CachedFeaturesDataModule


def cached(data: LightningDataModule, why: str) -> CachedFeaturesDataModule:
    """Return a data module that serves what is stored.

    Raises:
        TypeError: It serves something else.
    """
    if isinstance(data, CachedFeaturesDataModule):
        return data
    name = type(data).__name__
    raise TypeError(
        f"{why}, and data is {name}: put it into one, as --data CachedFeaturesDataModule --data.images {name}"
    )


def compute(
    trainer: Trainer, model: LightningModule, data: CachedFeaturesDataModule, boundaries: Collection[str] | None = None
) -> None:
    """Compute and store features, on all ranks.

    Args:
        trainer: Its strategy says on which.
        model: The classifier whose network it is.
        data: The images, and where features are stored.
        boundaries: Where in the network; None takes what a fit of the model would run from.
    """
    batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
    try:
        trainer.validate(model, datamodule=_Extraction(data, boundaries), verbose=False)
    finally:
        trainer.limit_val_batches = batches


class _Extraction(LightningDataModule):
    """Compute features where Lightning sets data up: on all ranks, once these know each other."""

    def __init__(self, data: CachedFeaturesDataModule, boundaries: Collection[str] | None) -> None:
        super().__init__()
        self.data = data
        self.boundaries = boundaries

    def prepare_data(self) -> None:
        """Prepare the images."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Compute the features."""
        self.data.trainer = self.trainer
        self.data.setup("fit")
        self.data.complete(self.boundaries or self.data.boundaries(fitting=True).values())

    def val_dataloader(self) -> list[object]:
        """Return nothing to validate on."""
        return []
