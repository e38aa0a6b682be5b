"""Preprocessing as the weights want it, and mild augmentation."""

from typing import Literal, NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

Flip = Literal["horizontal", "both", "none"]
_FLIPS = {
    "horizontal": (v2.RandomHorizontalFlip,),
    "both": (v2.RandomHorizontalFlip, v2.RandomVerticalFlip),
    "none": (),
}
_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")  # that torchvision knows of tensors


class Preprocessing(NamedTuple):
    """What an image goes through before a network sees it, as the network's weights were trained.

    The image is resized, cropped around its centre, scaled to [0, 1] and normalised per channel.
    """

    size: int | tuple[int, int] = 256
    """Pixels: an int is what the shorter side becomes; a (height, width) pair is met exactly, aspect ratio or not."""
    crop: int | tuple[int, int] = 224
    """Pixels: the side, or (height, width), of the centre crop that the network sees."""
    interpolation: str = "bilinear"
    """``nearest``, ``nearest-exact``, ``bilinear`` or ``bicubic``, values of torchvision's ``InterpolationMode``."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted per channel, on the scale [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divided by per channel, on the scale [0, 1]."""

    def at(self, image_size: int | None) -> "Preprocessing":
        """Return the same for images of another size, of which the whole centre square is seen; None changes nothing.

        Args:
            image_size: Side of the square, in pixels, to which the image's shorter side is resized.

        Raises:
            ValueError: The size is below 1.
        """
        if image_size is None:
            return self
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it is the side of a square in pixels")
        return self._replace(size=image_size, crop=image_size)

    @property
    def crop_shape(self) -> tuple[int, int]:
        """Height and width that the network sees, in pixels."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop


def eval_transform(preprocessing: Preprocessing) -> v2.Compose:
    """Build the deterministic transform of validation, test and prediction.

    Args:
        preprocessing: What the backbone's weights want.

    Returns:
        A callable from a uint8 image (3, H, W) to a float image (3, h, w), ``(h, w)`` being the crop's shape.
    """
    return v2.Compose([*eval_geometry(preprocessing).transforms, *to_input(preprocessing).transforms])


def eval_geometry(preprocessing: Preprocessing) -> v2.Compose:
    """Build the first half of :func:`eval_transform`.

    Returns:
        A callable from a uint8 image (3, H, W) to a uint8 image (3, h, w), ``(h, w)`` being the crop's shape.

    Raises:
        ValueError: A size or the interpolation is none.
    """
    _check_side("size", preprocessing.size)
    size = preprocessing.size if isinstance(preprocessing.size, int) else list(preprocessing.size)
    return v2.Compose(
        [
            v2.Resize(size, interpolation=_interpolation(preprocessing), antialias=True),
            v2.CenterCrop(_crop(preprocessing)),
        ]
    )


def to_input(preprocessing: Preprocessing) -> v2.Compose:
    """Build the second half of :func:`eval_transform`, which does the same to a whole batch as to each of its images.

    Returns:
        A callable from uint8 images (..., 3, h, w) to float images of that shape, scaled and normalised.

    Raises:
        ValueError: Mean or standard deviation are not of three channels, or the latter is not above 0.
    """
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            above = ", above 0" * (name == "std")
            raise ValueError(f"{name} is {values}; it is of three channels, on the scale from 0 to 1{above}")
    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(preprocessing.mean), std=list(preprocessing.std)),
        ]
    )


def train_transform(preprocessing: Preprocessing, flip: Flip = "horizontal", min_crop: float = 0.5) -> v2.Compose:
    """Build the random transform of training: a crop, and a flip in every second image.

    Both draw from torch's global generator. By default, the crop is milder than the 8 to 100 % of training from scratch
    (https://arxiv.org/abs/1409.4842), which costs accuracy where the data are few and the features are given.

    Args:
        preprocessing: What the backbone's weights want.
        flip: ``horizontal``; ``both`` flips vertically in every second image too, for what has no upside; ``none``, for what
            a mirror image would change, as text.
        min_crop: Smallest share of the image's area that is kept; more of it where what tells the classes apart is small, or
            lies at the border.

    Returns:
        A callable from a uint8 image (3, H, W) to a float image (3, h, w), ``(h, w)`` being the crop's shape.

    Raises:
        ValueError: The flip is none of these, or the share is not above 0 and at most 1.
    """
    if flip not in _FLIPS:
        raise ValueError(f"flip is {flip!r}; it is one of {', '.join(_FLIPS)}")
    if not 0 < min_crop <= 1:
        raise ValueError(f"min_crop is {min_crop}; it is a share of the image's area, above 0 and at most 1")
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                _crop(preprocessing),
                scale=(min_crop, 1.0),
                interpolation=_interpolation(preprocessing),
                antialias=True,
            ),
            *(step() for step in _FLIPS[flip]),
            *to_input(preprocessing).transforms,
        ]
    )


def _crop(preprocessing: Preprocessing) -> list[int]:
    _check_side("crop", preprocessing.crop)
    return list(preprocessing.crop_shape)


def _check_side(name: str, side: int | tuple[int, int]) -> None:
    sides = [side] if isinstance(side, int) else side
    if min(sides, default=0) < 1 or not (isinstance(side, int) or len(side) == 2):
        raise ValueError(f"{name} is {side}; it is the side of a square in pixels, or (height, width)")


def _interpolation(preprocessing: Preprocessing) -> InterpolationMode:
    if preprocessing.interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation is {preprocessing.interpolation!r}; it is one of {', '.join(_INTERPOLATIONS)}")
    return InterpolationMode(preprocessing.interpolation)
