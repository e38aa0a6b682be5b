"""Preprocess images as the weights expect them, and augment training images."""

from typing import Literal, NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

Flip = Literal["horizontal", "both", "none"]
_FLIPS = {
    "horizontal": (v2.RandomHorizontalFlip,),
    "both": (v2.RandomHorizontalFlip, v2.RandomVerticalFlip),
    "none": (),
}
_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")  # torchvision resizes tensors by these alone


class Preprocessing(NamedTuple):
    """How images are prepared for a network, as its weights were trained.

    An image is resized, cropped around its centre, scaled to [0, 1] and normalised per channel.
    """

    size: int | tuple[int, int] = 256
    """Pixels: an int is the length of the shorter side; (height, width) is exact and may change the aspect ratio."""
    crop: int | tuple[int, int] = 224
    """Pixels: the side, or (height, width), of the centre crop that the network sees."""
    interpolation: str = "bilinear"
    """``nearest``, ``nearest-exact``, ``bilinear`` or ``bicubic``, values of torchvision's ``InterpolationMode``."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted per channel, on the scale [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divided by per channel, on the scale [0, 1]."""

    def with_image_size(self, image_size: int | None) -> "Preprocessing":
        """Resize to another image size and show the network the whole centre square; None changes nothing.

        Args:
            image_size: Side of the square in pixels; the shorter side of an image is resized to it.

        Raises:
            ValueError: The size is below 2; torch cannot scale an image to a single pixel.
        """
        if image_size is None:
            return self
        if image_size < 2:
            raise ValueError(f"image_size is {image_size}; it must be at least 2, the side of a square in pixels")
        return self._replace(size=image_size, crop=image_size)

    @property
    def crop_shape(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the network sees."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop


def eval_transform(preprocessing: Preprocessing) -> v2.Compose:
    """Build the deterministic transform for validation, test and prediction.

    Args:
        preprocessing: Preprocessing that the weights of the backbone expect.

    Returns:
        A callable from a uint8 image (3, H, W) to a float image (3, h, w), where (h, w) is the shape of the crop.

    Raises:
        ValueError: See :func:`resize_crop_transform` and :func:`normalize_transform`.
    """
    return v2.Compose(
        [*resize_crop_transform(preprocessing).transforms, *normalize_transform(preprocessing).transforms]
    )


def resize_crop_transform(preprocessing: Preprocessing) -> v2.Compose:
    """Build the first half of :func:`eval_transform`: resize and crop.

    Returns:
        A callable from a uint8 image (3, H, W) to a uint8 image (3, h, w), where (h, w) is the shape of the crop.

    Raises:
        ValueError: The size, the crop or the interpolation is not valid.
    """
    _check_side("size", preprocessing.size)
    size = preprocessing.size if isinstance(preprocessing.size, int) else list(preprocessing.size)
    return v2.Compose(
        [
            v2.Resize(size, interpolation=_interpolation(preprocessing), antialias=True),
            v2.CenterCrop(_crop(preprocessing)),
        ]
    )


def normalize_transform(preprocessing: Preprocessing) -> v2.Compose:
    """Build the second half of :func:`eval_transform`, which works on a whole batch as on each of its images.

    Returns:
        A callable from uint8 images (..., 3, h, w) to float images of that shape, scaled and normalised.

    Raises:
        ValueError: Mean or standard deviation do not have three channels, or a standard deviation is not above 0.
    """
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            above = ", each above 0" * (name == "std")
            raise ValueError(
                f"{name} is {values}; give three numbers, one for each channel, on the scale 0 to 1{above}"
            )
    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(preprocessing.mean), std=list(preprocessing.std)),
        ]
    )


def train_transform(preprocessing: Preprocessing, flip: Flip = "horizontal", min_crop: float = 0.5) -> v2.Compose:
    """Build the random transform for training: a crop, and flips that each apply to half of the images.

    Both draw from torch's global generator. The default crop is milder than the 8 to 100 % of training from scratch
    (https://arxiv.org/abs/1409.4842), which costs accuracy with few images and pre-trained features.

    Args:
        preprocessing: Preprocessing that the weights of the backbone expect.
        flip: ``horizontal``; ``both`` flips vertically too, for images without an upside; ``none``, for images whose
            mirror image would mean something else, such as text.
        min_crop: Smallest share of the image's area that a crop keeps. Raise it if small details or the border of the
            image tell the classes apart.

    Returns:
        A callable from a uint8 image (3, H, W) to a float image (3, h, w), where (h, w) is the shape of the crop.

    Raises:
        ValueError: The flip is unknown, the share is not above 0 and at most 1, or see :func:`eval_transform`.
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
            *normalize_transform(preprocessing).transforms,
        ]
    )


def _crop(preprocessing: Preprocessing) -> list[int]:
    _check_side("crop", preprocessing.crop)
    return list(preprocessing.crop_shape)


def _check_side(name: str, side: int | tuple[int, int]) -> None:
    sides = [side] if isinstance(side, int) else side
    if min(sides, default=0) < 1 or not (isinstance(side, int) or len(side) == 2):
        raise ValueError(f"{name} is {side}; it is a number of pixels, at least 1, or a pair (height, width)")


def _interpolation(preprocessing: Preprocessing) -> InterpolationMode:
    if preprocessing.interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation is {preprocessing.interpolation!r}; it is one of {', '.join(_INTERPOLATIONS)}")
    return InterpolationMode(preprocessing.interpolation)
