"""Heads: from a backbone's pooled features, or its spatial map, to class scores."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

HeadCallable = Callable[[int, int], nn.Module]
"""Called with the number of features and of classes, returns the head."""


def check_head_factory(head: object) -> None:
    """Make sure that a head is given as something to be called, not as a finished one.

    Raises:
        ValueError: It is a module, or nothing that can be called.
    """
    if isinstance(head, nn.Module) or not callable(head):
        given = f"an object of {type(head).__name__}" if isinstance(head, nn.Module) else repr(head)
        raise ValueError(  # noqa: TRY004 - what is wrong is a choice of the user's
            f"head is {given}; give a class, as MLPHead, or functools.partial(MLPHead, hidden=[256]): it is made once the "
            "numbers of features and classes are known"
        )


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

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take the statistics of all features (N, D) at once, and forget what was seen before."""
        self.count.zero_()
        variance, mean = torch.var_mean(features.to(self.mean.dtype), 0, correction=0)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.count.fill_(len(features))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise the features; in train mode, add them to the statistics first."""
        if self.training:
            self._see(features.detach())
        standard = (features - self.mean) * torch.rsqrt(self.variance + self.eps)
        return standard.to(features.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the statistics with the module, but never to half precision, which cannot count beyond a few thousand."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, buffer in self.named_buffers():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before[name].to(buffer.device))
        return self

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


class MLPHead(nn.Module):
    """Map pooled features to class scores by fully connected layers with ReLU between them.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        hidden: Width of each hidden layer.
        dropout: Share of each hidden layer's outputs set to 0 in training.
        norm: What normalises each hidden layer before its ReLU.

    Raises:
        ValueError: No hidden layer, or one without units.

    Shape:
        Input: (N, D). Output: (N, K).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int] = (512,),
        dropout: float = 0.0,
        norm: Literal["none", "batch", "layer"] = "none",
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden is {list(hidden)}; it lists the width of each hidden layer, as [512, 256]")
        if norm not in ("none", "batch", "layer"):
            raise ValueError(f"norm is {norm!r}; it is 'none', 'batch' or 'layer'")
        norms = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        layers: list[nn.Module] = []
        for before, width in zip((in_features, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, width), norms[norm](width), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(hidden[-1], num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Compute class scores."""
        logits: Tensor = self.linear(self.layers(features))
        return logits  # (N, K)


class CosineHead(nn.Module):
    """Score classes by the cosine between the features and a learned direction for each class, times a learned scale.

    Lengths play no part, which helps where classes have few or very unequal numbers of images
    (https://arxiv.org/abs/1804.09458, section 3.3).

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        scale: What the cosines are multiplied by at first.

    Shape:
        Input: (N, D). Output: (N, K).
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight)
        self.scale = nn.Parameter(torch.tensor([float(scale)]))

    def forward(self, features: Tensor) -> Tensor:
        """Compute class scores."""
        directions = nn.functional.normalize(self.weight)
        return self.scale * nn.functional.linear(nn.functional.normalize(features), directions)  # (N, K)


class MapHead(nn.Module):
    """A head on the spatial map: made with the map's number of channels, and called with the map (N, C, h, w)."""


class ConvHead(MapHead):
    """Convolve the spatial map, pool it, and map the channels to class scores by a linear layer.

    Args:
        in_features: Number C of channels of the map.
        num_classes: Number K of classes.
        channels: Channels after the convolution.
        kernel_size: Side of the convolution's kernel, in cells of the map; odd.
        dropout: Share of the pooled channels set to 0 in training.

    Raises:
        ValueError: The kernel's side is even, so that the convolution would shift the map.

    Shape:
        Input: (N, C, h, w). Output: (N, K).
    """

    def __init__(
        self, in_features: int, num_classes: int, channels: int = 256, kernel_size: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd, as 1, 3 or 5")
        self.conv = nn.Conv2d(in_features, channels, kernel_size, padding=kernel_size // 2)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, spatial: Tensor) -> Tensor:
        """Compute class scores."""
        pooled = self.conv(spatial).relu().mean((2, 3))  # (N, channels)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits  # (N, K)


def resize_last_linear(module: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear layer of a pre-trained head by a new one for other classes; return the head."""
    name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    module.set_submodule(name, nn.Linear(last.in_features, num_classes))
    return module
