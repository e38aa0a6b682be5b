"""Heads that are trained by gradient steps: they map pooled features, or the spatial map, to logits."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tl_lightning.heads.standardize import Standardize

HeadCallable = Callable[[int, int], nn.Module]
"""Builds a head from the number of features and the number of classes."""


def check_head_factory(head: object) -> None:
    """Make sure that a head is given as a callable, not as a finished module.

    Args:
        head: The user's choice of a head.

    Raises:
        ValueError: The head is a module, or nothing that can be called.
    """
    if isinstance(head, nn.Module) or not callable(head):
        given = f"an object of {type(head).__name__}" if isinstance(head, nn.Module) else repr(head)
        raise ValueError(  # noqa: TRY004 - a wrong choice of the user
            f"head is {given}; give a class, as MLPHead, or functools.partial(MLPHead, hidden=[256]): it is made once "
            "the numbers of features and classes are known"
        )


class LinearHead(nn.Module):
    """Map pooled features to logits by one linear layer, with optional standardisation and dropout before it.

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
        # Small weights, as in MAE's linear probing (https://arxiv.org/abs/2111.06377).
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits."""
        logits: Tensor = self.linear(self.dropout(self.standardize(features)))
        return logits  # (N, K)


class MLPHead(nn.Module):
    """Map pooled features to logits by fully connected layers with ReLU between them.

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        hidden: Width of each hidden layer.
        dropout: Share of each hidden layer's outputs set to 0 in training.
        norm: Normalisation of each hidden layer before its ReLU: ``none``, ``batch`` norm or ``layer`` norm.

    Raises:
        ValueError: There is no hidden layer, one has no units, or the norm is unknown.

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
        for inputs, width in zip((in_features, *hidden), hidden, strict=False):
            layers += [nn.Linear(inputs, width), norms[norm](width), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(hidden[-1], num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits."""
        logits: Tensor = self.linear(self.layers(features))
        return logits  # (N, K)


class CosineHead(nn.Module):
    """Compute logits as scaled cosines between the features and one learned direction per class.

    The length of the features has no influence, which helps where classes have few images or very unequal numbers of
    them (https://arxiv.org/abs/1804.09458, section 3.3).

    Args:
        in_features: Length D of the features.
        num_classes: Number K of classes.
        scale: Initial value of the learned factor of the cosines.

    Shape:
        Input: (N, D). Output: (N, K).
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight)
        self.scale = nn.Parameter(torch.tensor([float(scale)]))

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits."""
        directions = nn.functional.normalize(self.weight)
        return self.scale * nn.functional.linear(nn.functional.normalize(features), directions)  # (N, K)


class MapHead(nn.Module):
    """Base of heads on the spatial map (N, C, h, w): built from its number of channels, and called with the map."""


class ConvHead(MapHead):
    """Convolve the spatial map, average it over its cells, and map the channels to logits by a linear layer.

    Args:
        in_features: Number C of channels of the map.
        num_classes: Number K of classes.
        channels: Number of channels after the convolution.
        kernel_size: Side of the convolution's kernel, in cells of the map; an odd number.
        dropout: Share of the pooled channels set to 0 in training.

    Raises:
        ValueError: The kernel size is even, so that the convolution would shift the map.

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
        """Compute logits."""
        pooled = self.conv(spatial).relu().mean((2, 3))  # (N, channels)
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits  # (N, K)


def resize_last_linear(module: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear layer of a pre-trained head by a new one with another number of classes; return the head.

    Args:
        module: The head, changed in place.
        num_classes: Number K of classes.
    """
    name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    module.set_submodule(name, nn.Linear(last.in_features, num_classes))
    return module
