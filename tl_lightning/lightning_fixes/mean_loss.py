"""The mean loss."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """The mean over samples of a loss that is known as the mean of each batch, over batches and ranks.

    Unlike torchmetrics' MeanMetric it neither passes over a loss that is not a number nor, told to let it through
    (``nan_strategy="disable"``, torchmetrics 1.9), forgets how many samples a batch has.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Add the mean loss (a scalar) of so many samples."""
        self.total = (
            self.total + mean * samples
        )  # not in place: validation before a fit leaves an inference tensor here
        self.count = self.count + samples

    def compute(self) -> Tensor:
        """Return the mean over all samples, a scalar."""
        return self.total / self.count

    @property
    def sums(self) -> Tensor:
        """Sum of the losses, and number of samples (2,), of this rank so far."""
        return torch.stack([self.total, self.count]).detach()

    def load_sums(self, sums: Tensor) -> None:
        """Begin with the sums (2,) of another."""
        self.total, self.count = sums.to(self.total)
