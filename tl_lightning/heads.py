"""Heads: from a backbone's pooled features to class scores."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Standardize(nn.Module):
    """Shift and scale features to mean 0 and standard deviation 1 by the statistics of everything seen in training.

    A linear probe is then as easy to fit on any backbone, as with the batch norm without parameters of MAE's linear
    probing (https://arxiv.org/abs/2111.06377, appendix A.1). Unlike batch norm, a sample's output does not depend on what
    else is in its batch, training and evaluation use the same statistics, and all ranks share them. A batch's statistics
    are added before the batch is transformed (Chan et al. 1983, https://doi.org/10.1080/00031305.1983.10483115).

    Args:
        features: Length D of the vectors.
        eps: Added to the variance.

    Shape:
        Input and output: (N, D).
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise the features; in train mode, add them to the statistics first."""
        if self.training:
            self._see(features.detach())
        return (features - self.mean) * torch.rsqrt(self.variance + self.eps)

    @torch.no_grad()
    def _see(self, features: Tensor) -> None:
        features = features.to(self.mean.dtype)
        sums = _over_ranks(torch.cat([features.sum(0), features.new_full((1,), len(features))]))
        count = sums[-1]
        mean = sums[:-1] / count
        within = _over_ranks((features - mean).square().sum(0))  # from their own mean, so that nothing cancels
        both = self.count + count
        shift = mean - self.mean
        self.variance.copy_((self.variance * self.count + within + shift.square() * self.count * count / both) / both)
        self.mean.add_(shift * count / both)
        self.count.copy_(both)


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


class LinearHead(nn.Module):
    """Map pooled features to class scores by one linear layer, after standardising and dropout where asked for.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        standardize: Standardise the features first; see :class:`Standardize`.
        dropout: Share of the features set to 0 in training.

    Shape:
        Input: (N, D). Output: (N, K).
    """

    def __init__(self, in_features: int, num_classes: int, standardize: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.standardize = Standardize(in_features) if standardize else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)  # small, as in MAE's linear probing
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute class scores."""
        logits: Tensor = self.linear(self.dropout(self.standardize(features)))
        return logits  # (N, K)
