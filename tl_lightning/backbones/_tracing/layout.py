"""Recognize how a network lays out its features: channels first, channels last, or tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def to_map(features: Tensor, images: Tensor) -> Tensor:
    """Bring the features before the pooling to (N, C, h, w).

    Args:
        features: (N, C, h, w), (N, h, w, C), or tokens (N, T, C) whose last h * w are patches, row by row.
        images: (N, 3, H, W), with the aspect ratio of the patches.
    """
    height, width = images.shape[-2:]
    if features.ndim == 4:
        return features if is_channels_first(features.shape[1:], height / width) else features.permute(0, 3, 1, 2)
    tokens = features.shape[1]
    rows, columns = patch_grid(tokens, height / width)
    patches = features[:, tokens - rows * columns :]
    return torch.unflatten(patches.transpose(1, 2), 2, (rows, columns))


def is_channels_first(shape: Sequence[int], aspect_ratio: float) -> bool:
    """Tell (C, h, w) from (h, w, C) by the aspect ratio of the image, its height over its width."""
    gaps = [abs(math.log(height / width / aspect_ratio)) for height, width in (shape[1:], shape[:2])]
    return gaps[0] <= gaps[1]


def patch_grid(tokens: int, aspect_ratio: float) -> tuple[int, int]:
    """Return the rows and columns of the patches among tokens, given the height of the image over its width."""
    rows = math.isqrt(int(tokens * aspect_ratio))
    return rows, round(rows / aspect_ratio)


@dataclass(frozen=True)
class SpatialMean:
    """Average a map over its places, or tokens over the patches; leave a vector as it is."""

    dims: tuple[int, ...]
    class_tokens: int = 0
    """Number of tokens before the patches; they are left out."""

    @classmethod
    def for_shape(cls, shape: Sequence[int], aspect_ratio: float) -> "SpatialMean":
        """Choose the mean for a shape without its batch dimension, given the height of the image over its width."""
        if len(shape) == 1:
            return cls(())
        if len(shape) == 2:
            rows, columns = patch_grid(shape[0], aspect_ratio)
            return cls((1,), shape[0] - rows * columns)
        return cls((2, 3) if is_channels_first(shape, aspect_ratio) else (1, 2))

    def __call__(self, features: Tensor, /) -> Tensor:
        """Return (N, C)."""
        return features[:, self.class_tokens :].mean(self.dims) if self.dims else features
