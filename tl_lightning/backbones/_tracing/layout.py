"""How networks lay out what they make of an image: channels first or last, or tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def to_map(output: Tensor, images: Tensor) -> Tensor:
    """Bring what a network has before its pooling to (N, C, h, w).

    Args:
        output: (N, C, h, w), (N, h, w, C), or tokens (N, T, C) of which the last h * w are patches, row by row.
        images: (N, 3, H, W), whose aspect ratio the patches share.
    """
    height, width = images.shape[-2:]
    if output.ndim == 4:
        return output if channels_come_first(output.shape[1:], height / width) else output.permute(0, 3, 1, 2)
    tokens = output.shape[1]
    rows, columns = patch_grid(tokens, height / width)
    patches = output[:, tokens - rows * columns :]
    return torch.unflatten(patches.transpose(1, 2), 2, (rows, columns))


def channels_come_first(shape: Sequence[int], ratio: float) -> bool:
    """Return whether a shape is (C, h, w) rather than (h, w, C), by the ratio of an image's height to its width."""
    gaps = [abs(math.log(height / width / ratio)) for height, width in (shape[1:], shape[:2])]
    return gaps[0] <= gaps[1]


def patch_grid(tokens: int, ratio: float) -> tuple[int, int]:
    """Return rows and columns of the patches among tokens, by the ratio of an image's height to its width."""
    rows = math.isqrt(int(tokens * ratio))
    return rows, round(rows / ratio)


@dataclass(frozen=True)
class MeanOverPlaces:
    """The mean over all places of a map, or over all patches; a vector stays as it is."""

    dims: tuple[int, ...]
    skipped: int = 0
    """Number of tokens that are no patches."""

    @classmethod
    def of(cls, shape: Sequence[int], ratio: float) -> "MeanOverPlaces":
        """Choose the mean for a shape without its batch, by the ratio of an image's height to its width."""
        if len(shape) == 1:
            return cls(())
        if len(shape) == 2:
            rows, columns = patch_grid(shape[0], ratio)
            return cls((1,), shape[0] - rows * columns)
        return cls((2, 3) if channels_come_first(shape, ratio) else (1, 2))

    def __call__(self, output: Tensor, /) -> Tensor:
        """Return (N, C)."""
        return output[:, self.skipped :].mean(self.dims) if self.dims else output
