"""Standardise features by running statistics."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self


class Standardize(nn.Module):
    """Shift and scale features to mean 0 and standard deviation 1, by the statistics of all training batches so far.

    A linear probe is then equally easy to train on any backbone. MAE uses batch norm without parameters in the same
    place (https://arxiv.org/abs/2111.06377, appendix A.1). In contrast to batch norm, the output for a sample does not
    depend on the rest of its batch. Training and evaluation use the same statistics, and all ranks share them.

    In training, a batch is added to the statistics before it is transformed (Chan et al. 1983,
    https://doi.org/10.1080/00031305.1983.10483115).

    Args:
        features: Length D of the features.
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

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Replace the statistics by those of the given features (N, D)."""
        self.count.zero_()
        variance, mean = torch.var_mean(features.to(self.mean.dtype), 0, correction=0)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.count.fill_(len(features))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise the features; in train mode, add them to the statistics first."""
        if self.training:
            self._update(features.detach())
        standardized = (features - self.mean) * torch.rsqrt(self.variance + self.eps)
        return standardized.to(features.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the statistics with the module, but never to half precision, which cannot count above a few thousand."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, buffer in self.named_buffers():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before[name].to(buffer.device))
        return self

    @torch.no_grad()
    def _update(self, features: Tensor) -> None:
        """Add a batch, of all ranks, to the statistics."""
        features = features.to(self.mean.dtype)
        sums = _sum_over_ranks(torch.cat([features.sum(0), features.new_full((1,), len(features))]))
        batch_count = sums[-1]
        batch_mean = sums[:-1] / batch_count
        # Squares around the batch's mean: the difference of two large sums would lose the digits of a small variance.
        squares = _sum_over_ranks((features - batch_mean).square().sum(0))
        total = self.count + batch_count
        shift = batch_mean - self.mean
        between = shift.square() * self.count * batch_count / total
        self.variance.copy_((self.variance * self.count + squares + between) / total)
        self.mean.add_(shift * batch_count / total)
        self.count.copy_(total)


def _sum_over_ranks(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums
