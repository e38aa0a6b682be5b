"""Compute features without training."""

from collections.abc import Collection

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tl_lightning.data import CachedFeaturesDataModule


def require_cached_features(data: LightningDataModule, why: str) -> CachedFeaturesDataModule:
    """Return a data module if it serves cached features.

    Args:
        data: The data module.
        why: The first words of the error: why cached features are needed.

    Raises:
        TypeError: The data module serves no cached features.
    """
    if isinstance(data, CachedFeaturesDataModule):
        return data
    name = type(data).__name__
    raise TypeError(f"{why}, and data is {name}: wrap it, by --data CachedFeaturesDataModule --data.images {name}")


def compute_features(
    trainer: Trainer, model: LightningModule, data: CachedFeaturesDataModule, boundaries: Collection[str] | None = None
) -> None:
    """Compute and cache features, on all ranks.

    Args:
        trainer: The trainer, whose strategy starts the ranks.
        model: The classifier, with the network.
        data: The images and their cache.
        boundaries: The boundaries whose activations are cached; None takes those that a fit of the model would serve.
    """
    batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
    try:
        trainer.validate(model, datamodule=_Extraction(data, boundaries), verbose=False)
    finally:
        trainer.limit_val_batches = batches


class _Extraction(LightningDataModule):
    """Compute features in the ``setup`` hook, which Lightning calls on all ranks once they are connected."""

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
        """Return no batches."""
        return []
