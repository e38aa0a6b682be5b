"""The mean loss over samples, also where the loss is not a number.

torchmetrics' MeanMetric either skips losses that are not a number or, with ``nan_strategy="disable"``, ignores the
weights (torchmetrics 1.9, https://github.com/Lightning-AI/torchmetrics/blob/master/src/torchmetrics/aggregation.py).
This file can be deleted when MeanMetric keeps both.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Average a loss over samples, batches and ranks, given the mean loss of each batch."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Add the mean loss (a scalar) of a batch of ``samples``."""
        self.total = self.total + mean * samples  # not in place: the sanity validation leaves inference tensors here
        self.count = self.count + samples

    def compute(self) -> Tensor:
        """Return the mean over all samples, a scalar."""
        return self.total / self.count

    @property
    def sums(self) -> Tensor:
        """Sum of the losses and number of samples (2,) of this rank so far."""
        return torch.stack([self.total, self.count]).detach()

    def load_sums(self, sums: Tensor) -> None:
        """Start from the :attr:`sums` (2,) of an interrupted epoch."""
        self.total, self.count = sums.to(self.total)
