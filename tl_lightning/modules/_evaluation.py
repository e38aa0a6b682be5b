"""Validation, test and prediction."""

from abc import abstractmethod

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MetricCollection

from tl_lightning.batch import PADDING, Batch, ImageSource
from tl_lightning.lightning_fixes.mean_loss import MeanLoss
from tl_lightning.utils.messages import listed


class EvaluationMixin(LightningModule):
    """A module whose loss and metrics count each sample once, on any number of ranks; padding rows do not count."""

    @abstractmethod
    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of a batch."""

    @abstractmethod
    def forward_from(self, inputs: Tensor, boundary: str | None) -> Tensor:
        """Continue from a boundary to the logits."""

    @abstractmethod
    def build_metrics(self) -> MetricCollection:
        """Build the metrics of validation and test; their names are logged after ``val_`` and ``test_``."""

    def build_evaluation(self) -> None:
        """Build the losses and metrics of validation and test."""
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        metrics = self.build_metrics()
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a validation batch to the loss and the metrics."""
        self._evaluate(batch, "val_loss", self.val_loss, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a test batch to the loss and the metrics."""
        self._evaluate(batch, "test_loss", self.test_loss, self.test_metrics)

    def _evaluate(self, batch: Batch, loss_name: str, loss: MeanLoss, metrics: MetricCollection) -> None:
        logits = self.forward_from(batch.inputs, batch.boundary)
        is_sample = batch.index != PADDING
        if bool(is_sample.any()):
            logits, target = logits[is_sample], batch.target[is_sample]
            loss.update(self.compute_loss(logits, target), len(logits))
            metrics.update(logits, target)
        self.log(loss_name, loss, on_step=False, on_epoch=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the probability of each class.

        Shape:
            Output: (N, K), including padding rows; ``batch.index`` tells them apart.

        Raises:
            ValueError: The logits of an image are not finite, so that it has no probabilities.
        """
        logits = self.forward_from(batch.inputs, batch.boundary).float()
        bad = batch.index[~logits.isfinite().all(-1) & (batch.index != PADDING)].tolist()
        if bad:
            raise ValueError(self._without_probabilities(bad))
        return logits.softmax(-1)

    def _without_probabilities(self, indices: list[int]) -> str:
        """Say which images of the prediction have logits that are not finite."""
        data = getattr(self.trainer, "datamodule", None)
        files = data.predict_files if isinstance(data, ImageSource) else ()
        named = listed([files[index] if index < len(files) else f"number {index}" for index in indices])
        model = f"the checkpoint {str(self.trainer.ckpt_path)!r}" if self.trainer.ckpt_path else "the model"
        return (
            f"{model} gives logits that are not finite for the image {named}, so there are no "
            "probabilities to write. Remove these images, or predict with --trainer.precision 32-true"
        )
