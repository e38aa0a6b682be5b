"""Check that a network computes the same output for an image every time, whichever images share its batch."""

from collections.abc import Collection

import torch
from torch import Tensor

from tl_lightning.backbones import Backbone
from tl_lightning.features.activations import activations, reference_tensor
from tl_lightning.freezing import HEAD, MAP, eval_mode, frozen_forward

_SAME_KERNELS = 1e-5  # relative: rounding in single precision, where a device sums in no fixed order
_OTHER_KERNELS = 1e-2  # relative: in any precision, since an image by itself may be computed by other kernels
_STEP = 0.7548776662466927  # multiples of it, modulo 1, fill the unit interval evenly and without visible order


def patterns(height: int, width: int) -> Tensor:
    """Return four test images: noise in the range of an image, noise far beyond it, waves, and a bright area.

    Shape:
        Output: (4, 3, H, W).
    """
    number = torch.arange(1, 3 * height * width + 1, dtype=torch.float64)
    noise = (number * _STEP).frac().view(3, height, width) * 2 - 1
    rows, columns = torch.arange(height).view(-1, 1) / height, torch.arange(width) / width
    waves = torch.stack([torch.sin(6 * rows + (2 + 3 * channel) * columns) for channel in range(3)])
    return torch.stack([2 * noise, 10 * noise, 3 * waves + 0.5 * noise, 2.6 + 0.1 * noise + 0 * waves])


def pattern_rows(backbone: Backbone, boundaries: Collection[str], batch_size: int = 4) -> dict[str, Tensor]:
    """Compute the activations (4, ...) of the test patterns at each boundary."""
    images = _patterns_for(backbone)
    with torch.inference_mode(), frozen_forward(images.device.type), eval_mode(backbone):
        batches = [activations(backbone, batch, boundaries) for batch in torch.split(images, batch_size)]
    return {boundary: torch.cat([batch[boundary] for batch in batches]) for boundary in boundaries}


def check_deterministic(backbone: Backbone, boundary: str) -> None:
    """Make sure that the activations of an image at a boundary can be cached.

    Args:
        backbone: The network.
        boundary: A stage, ``"head"`` or ``"map"``.

    Raises:
        ValueError: The activations depend on chance or on the other images of the batch, or the stages do not compute
            the output of the network's own ``forward``.
    """
    name = type(backbone).__name__
    if boundary not in (HEAD, MAP):
        images = _patterns_for(backbone)
        prefix, suffix = backbone.split(boundary)
        with torch.inference_mode(), frozen_forward(images.device.type), eval_mode(backbone):
            by_stages, by_forward = suffix(prefix(images)), backbone(images)
        if not _is_close(by_stages, by_forward, _OTHER_KERNELS):
            raise ValueError(
                f"{name} computes other features than its stages one after the other, so activations before "
                f"{boundary!r} cannot be cached: its forward does more than they do. Let split return parts "
                "that do all of it"
            )
    first, second = (pattern_rows(backbone, [boundary])[boundary] for _ in range(2))
    alone = pattern_rows(backbone, [boundary], batch_size=1)[boundary]
    if not (_is_close(first, second, _SAME_KERNELS) and _is_close(first, alone, _OTHER_KERNELS)):
        raise ValueError(
            f"{name} does not compute the same output for an image each time, even in eval mode: the output depends on "
            "chance or on the other images of the batch, so it cannot be cached. Train on the images themselves, "
            "without CachedFeaturesDataModule"
        )


def _patterns_for(backbone: Backbone) -> Tensor:
    return patterns(*backbone.preprocessing.crop_shape).to(reference_tensor(backbone))


def _is_close(rows: Tensor, others: Tensor, tolerance: float) -> bool:
    """Return whether the difference of each row is within the tolerance, relative to the norm of the row."""
    first, second = (each.to("cpu", torch.float64).flatten(1).nan_to_num() for each in (rows, others))
    return bool(((first - second).norm(dim=1) <= tolerance * first.norm(dim=1)).all())
